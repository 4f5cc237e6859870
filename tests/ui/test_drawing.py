"""The prompt box: what is asked for is checked, what is drawn is kept, and the images are those of the command."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra ui is not installed: pip install 'finetune-diffusion[ui]'")

from asgi import opened
from test_pages import a_run, photo

from finetune.core.errors import BadInput
from finetune.core.files import write_json
from finetune.ui.cards import card_page
from finetune.ui.plain_words import WITH_STRENGTH
from finetune.ui.prompt_box import Drawings, PromptWish, Side, draw_wish, wish_of

GOOD = {"prompt": " a zwx  mug ", "sides": [{"run": "mug", "step": 5, "weight": 0.8}, {"run": "mug", "base": True}]}


def test_a_wish_is_read() -> None:
    asked: list[str] = []
    wish = wish_of(GOOD | {"seed": 7, "count": 2, "guidance": 3}, asked.append)
    sides = (Side("mug", 5, 0.8), Side("mug", base=True))
    assert wish == PromptWish("a zwx mug", sides, seed=7, count=2, guidance=3.0)
    assert asked == ["mug", "mug"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt", " "), ("prompt", "x" * 2001), ("sides", []), ("sides", [1]), ("sides", GOOD["sides"] * 2),
        ("sides", [{"run": "mug", "weight": 9}]), ("sides", [{"run": "mug", "weight": "1"}]),
        ("sides", [{"run": "mug", "step": -1}]), ("seed", -1), ("seed", 2**40), ("count", 9), ("count", True),
        ("steps", 0), ("steps", 1.5), ("guidance", 1e9), ("guidance", "x"),
    ],
)  # fmt: skip
def test_a_strange_wish_is_refused_in_a_sentence(key: str, value: object) -> None:
    with pytest.raises(BadInput) as caught:
        wish_of(GOOD | {key: value}, lambda run: None)
    assert "\n" not in str(caught.value)


def test_the_page_shows_keeps_and_removes_drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = a_run(tmp_path)
    (run / "exports").mkdir()
    text = "---\ntags: [lora]\n---\n\n# mug <script>x</script>\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    (run / "exports" / "README.md").write_text(text)
    folder = Drawings(tmp_path / "finetune-ui").new()
    (folder / "0").mkdir(parents=True)
    (folder / "0" / "00-7.png").write_bytes(photo())
    (folder / "0" / "00-8.png").symlink_to(run / "recipe.yaml")
    write_json(folder / "drawing.json", asdict(PromptWish("a mug", (Side("mug"),), seed=7, count=1)) | {"notes": []})

    async def going() -> None:
        async with opened(tmp_path) as browser:
            drawn = (await browser.get("/api/runs/mug/drawn")).told["drawn"]
            assert [(each["name"], each["prompt"]) for each in drawn] == [(folder.name, "a mug")]
            assert (await browser.get(f"/drawn/{folder.name}/0/00-7.png")).body == photo()
            own = folder.name
            for wrong in (f"{own}/0/00-8.png", f"{own}/0/drawing.json", "../0/00-7.png", "x/0/00-7.png"):
                assert (await browser.get(f"/drawn/{wrong}")).status in (404, 422), wrong
            assert (await browser.post("/api/runs/mug/draw", GOOD | {"sides": [{"run": "../x"}]})).status == 422
            card = await browser.get("/runs/mug/card.html")
            assert b"<h1>mug &lt;script&gt;" in card.body
            assert b"<td>1</td>" in card.body
            assert "sandbox" in card.headers["content-security-policy"]
            about = (await browser.get("/api/runs/mug")).told
            assert (about["has_card"], about["has_strength"]) == (True, False)  # its recipe names no method
            assert (await browser.post(f"/api/drawn/{folder.name}/remove")).told == {"done": True}
            assert (await browser.get("/api/runs/mug/drawn")).told == {"drawn": []}
            assert (await browser.post("/api/drawn/..%2f..%2fruns/remove")).status in (404, 422, 405)
            assert run.is_dir()

    asyncio.run(going())


def test_a_run_without_a_card_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no model card yet"):
        card_page(tmp_path)


def test_strength_is_offered_where_it_works() -> None:
    from finetune.methods.registry import METHODS

    assert tuple(name for name, kind in METHODS.items() if kind.low_rank) == WITH_STRENGTH


@pytest.mark.slow
def test_two_sides_draw_what_the_command_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained side differs from the base, and strength 0 is the base; the pixels are those of `open_result`."""
    import numpy as np
    from PIL import Image

    from finetune.config.load import load_recipe
    from finetune.jobs.demo import demo_images
    from finetune.jobs.train import train

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    more = [
        f"data.photos={demo_images()}", "data.class_noun=mug", "run.steps=3", "prior.kind=none", "run.verdicts=off",
        "sample.count=1", "sample.steps=1", "export.formats=[kohya]", "export.verify=off", "optim.lr=0.02",
        f"run.dir={tmp_path / 'runs' / 'mug'}",
    ]  # fmt: skip
    train(load_recipe("dreambooth-lora", more))
    drawn = {}
    for name, side in {"trained": Side("mug"), "off": Side("mug", weight=0.0), "base": Side("mug", base=True)}.items():
        wish = PromptWish("a {token} mug", (side,), seed=3, count=1, steps=2)
        draw_wish({"wish": asdict(wish), "runs": str(tmp_path / "runs"), "folder": str(tmp_path / "drawn" / name)})
        with Image.open(tmp_path / "drawn" / name / "0" / "00-3.png") as image:
            drawn[name] = np.asarray(image).astype(int)
    assert np.abs(drawn["off"] - drawn["base"]).max() <= 1
    assert np.abs(drawn["trained"] - drawn["base"]).max() > 3
