"""LoRA files that are dropped into the page: checked, converted and merged by the commands' own functions."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra ui is not installed: pip install 'finetune-diffusion[ui]'")

from asgi import opened

from finetune.core.errors import BadInput
from finetune.ui.lora_work import convert_lora, merge_loras, verify_lora
from finetune.ui.loras import Loras
from finetune.ui.uploads import Uploads

ONE, TWO, NEW = "0" * 16, "1" * 16, "2" * 16


@pytest.fixture
def loras(tmp_path: Path) -> Loras:
    found = Loras(Uploads(tmp_path))
    for chosen, name in ((ONE, "a.safetensors"), (TWO, "b.safetensors")):
        (found.home / chosen).mkdir(parents=True)
        (found.home / chosen / name).write_bytes(b"weights")
    return found


def test_files_are_listed_sent_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def going() -> None:
        async with opened(tmp_path) as browser:
            sent = await browser.put("/api/loras?name=mine.safetensors", b"weights")
            chosen = sent.told["id"]
            files = (await browser.get("/api/loras")).told["files"]
            assert files == [{"id": chosen, "name": "mine.safetensors", "size": 7, "made": "", "lora": True}]
            back = await browser.get(f"/loras/{chosen}")
            assert (back.body, "mine.safetensors" in back.headers["content-disposition"]) == (b"weights", True)
            for wrong in ("0" * 16, "..", "%2e%2e"):
                assert (await browser.get(f"/loras/{wrong}")).status in (404, 422)
                assert (await browser.post(f"/api/loras/{wrong}/remove")).status in (404, 422, 405)
            refused = await browser.post(f"/api/loras/{chosen}/verify", {"base": "../secret"})
            assert (refused.status, "not a hub id" in refused.told["error"]) == (422, True)
            assert (await browser.put("/api/loras?name=a.ckpt", b"x")).status == 422
            assert (await browser.post(f"/api/loras/{chosen}/remove")).told == {"done": True}
            assert (await browser.get("/api/loras")).told["files"] == []

    asyncio.run(going())


def test_what_is_asked_for_is_read(loras: Loras) -> None:
    given = loras.conversion(ONE, {"to": "diffusers"})
    assert (Path(given["file"]).name, given["to"], given["name"], given["dtype"]) == (
        "a.safetensors", "diffusers", "a", None,
    )  # fmt: skip
    given = loras.merging({"files": [[ONE, 1], [TWO, 0.5]], "to": "kohya", "rank": 4})
    assert given["note"] == {"made": "1 × a.safetensors + 0.5 × b.safetensors", "lora": True}
    assert [Path(file).name for file, _ in given["files"]] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        {"files": [[ONE, 1]]}, {"files": []}, {"files": [[ONE, 1], ["../x", 1]]}, {"files": [[ONE, 1], [TWO, 0]]},
        {"files": [[ONE, 1], [TWO, "1"]]}, {"files": [[ONE, 1], [TWO, 1e9]]}, {"to": "x"}, {"to": None},
        {"rank": 0}, {"rank": 10**6}, {"to": "folder", "rank": 4}, {"files": 3}, {"files": [ONE, TWO]},
    ],
)  # fmt: skip
def test_a_strange_merge_is_refused_in_a_sentence(change: dict, loras: Loras) -> None:
    with pytest.raises(BadInput) as caught:
        loras.merging({"files": [[ONE, 1], [TWO, 1]], "to": "kohya", "rank": None} | change)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_file_is_verified_converted_and_merged(loras: Loras) -> None:
    """Half of a file and half of itself is the file; diffusers' names hold the same as kohya's."""
    from adapter_files import kohya_file
    from safetensors.torch import save_file

    from finetune.adapters.inspection import open_adapter
    from finetune.families.source import resolve_base

    base = resolve_base("tiny")
    own = loras.path(ONE)
    save_file({name: value for name, value in kohya_file(base).items() if name.startswith("lora_unet_")}, own)
    told = verify_lora({"file": str(own), "base": "tiny"})
    assert (told["problems"], told["ranks"]) == ([], [2])
    where = {"base": "tiny", "folder": str(loras.home / NEW)}
    convert_lora(loras.conversion(ONE, {"to": "diffusers"}) | where)
    assert (loras.listed()[0]["made"], loras.listed()[0]["lora"]) == ("a.safetensors as diffusers", True)
    read = [open_adapter(file, "tiny")[0] for file in (own, loras.path(NEW))]
    merge_loras(loras.merging({"files": [[ONE, 0.5], [NEW, 0.5]], "to": "kohya"}) | where)
    read.append(open_adapter(loras.path(NEW), "tiny")[0])
    first, *others = [
        {(part, name): one.scale * (b.flatten(1) @ a.flatten(1)) for part, name, a, b in one.modules()} for one in read
    ]
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            assert (other[name] - value).abs().max() <= 2e-3 * value.abs().max()
    with pytest.raises(BadInput, match="say which base"):
        merge_loras(loras.merging({"files": [[ONE, 1]], "to": "folder"}) | where | {"base": None})
