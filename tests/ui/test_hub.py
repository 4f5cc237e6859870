"""Sending to the hub, against an object that stands for its client: nothing here reaches a network."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

pytest.importorskip("starlette", reason="the extra ui is not installed: pip install 'finetune-diffusion[ui]'")

from asgi import opened
from huggingface_hub import errors
from test_pages import a_run

from finetune.core.errors import BadInput
from finetune.ui.pushing import files_to_send, push_of, push_run

TOKEN = "hf_secret0123456789"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    found = a_run(tmp_path)
    for name in ("README.md", "mug.safetensors", "images/0.png", "step-000002/mug.safetensors", ".hidden"):
        (found / "exports" / name).parent.mkdir(parents=True, exist_ok=True)
        (found / "exports" / name).write_bytes(b"12345")
    return found


class Hub:
    """What HfApi is asked for; `fault` is raised by the first call."""

    fault: Exception | None = None
    asked: list[tuple[str, dict[str, Any]]] = []

    def __init__(self, token: str | None) -> None:
        self.asked.append(("login", {"token": token}))

    def create_repo(self, repo_id: str, **more: Any) -> str:
        if self.fault is not None:
            raise self.fault
        self.asked.append(("create", {"repo_id": repo_id, **more}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **more: Any) -> None:
        self.asked.append(("upload", more))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "fault", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_what_is_shown_is_what_is_sent(run: Path, hub: type[Hub]) -> None:
    assert files_to_send(run) == [("README.md", 5), ("images/0.png", 5), ("mug.safetensors", 5)]
    told = push_run(push_of({"repo": " me/mug ", "token": TOKEN}, run))
    assert told == {"url": "https://huggingface.co/me/mug", "files": 3}
    (_, login), (_, made), (_, sent) = hub.asked
    assert login == {"token": TOKEN}
    assert made == {"repo_id": "me/mug", "private": True, "exist_ok": True}  # for others only if asked for
    assert (sent["repo_id"], sent["folder_path"]) == ("me/mug", run / "exports")
    names = [file.relative_to(run / "exports").as_posix() for file in (run / "exports").rglob("*") if file.is_file()]
    kept = huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=sent["ignore_patterns"])
    assert sorted(kept) == [name for name, _ in files_to_send(run)]


def test_without_a_token_the_machines_login_is_used(run: Path, hub: type[Hub]) -> None:
    push_run(push_of({"repo": "me/mug", "private": False}, run))
    assert hub.asked[0] == ("login", {"token": None})
    assert hub.asked[1][1]["private"] is False


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (401, "does not know this token"), (403, "may not write to me/mug"), (404, "may not write"), (500, "500"),
        (errors.LocalTokenNotFoundError("x"), "not logged in"), (errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE"),
        (ConnectionError("x"), "can't be reached"), (errors.HTTPError("x"), "can't be reached"),
    ],
)  # fmt: skip
def test_a_refusal_is_a_sentence_without_the_token(
    fault: Any, said: str, run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(fault, int):
        answer: Any = SimpleNamespace(status_code=fault, headers={}, request=None)
        fault = errors.HfHubHTTPError(f"no: {TOKEN}", response=answer)
    monkeypatch.setattr(hub, "fault", fault)
    with pytest.raises(BadInput, match=said) as caught:
        push_run(push_of({"repo": "me/mug", "token": TOKEN}, run))
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"repo": "mug"}, {"repo": "../x"}, {"repo": "a/b/c"}, {"repo": "me/mug", "token": "a b"}, {}]
)
def test_a_strange_wish_is_refused(values: dict, run: Path) -> None:
    with pytest.raises(BadInput):
        push_of(values, run)


def test_a_run_without_files_or_with_a_link_sends_nothing(run: Path, tmp_path: Path) -> None:
    (run / "exports" / "more").symlink_to(tmp_path)
    with pytest.raises(BadInput, match="link out"):
        push_of({"repo": "me/mug"}, run)
    (run / "exports" / "README.md").unlink()
    with pytest.raises(BadInput, match="no model card"):
        push_of({"repo": "me/mug"}, run)


def test_the_server_keeps_no_token(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real chore, offline: it is refused in a sentence, and the token is in no answer, no file and no object."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    async def going() -> None:
        async with opened(tmp_path) as browser:
            files = (await browser.get("/api/runs/mug/push")).told["files"]
            assert [name for name, _ in files] == ["README.md", "images/0.png", "mug.safetensors"]
            number = (await browser.post("/api/runs/mug/push", {"repo": "me/mug", "token": TOKEN})).told["chore"]
            told = await browser.chore(number)
            assert (told["state"], "HF_HUB_OFFLINE" in told["error"]) == ("failed", True)
            assert TOKEN not in str(vars(browser.pages.helpers.look(number)))
            for file in tmp_path.rglob("*"):
                assert not file.is_file() or TOKEN.encode() not in file.read_bytes()

    asyncio.run(going())
