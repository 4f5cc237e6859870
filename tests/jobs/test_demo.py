"""The demo as it is shipped, judged: the subject is learned, stands in new places, and its class is left alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune.config.load import load_recipe
from finetune.jobs import demo
from finetune.jobs.demo import demo_images, run_demo

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "tiny_base"))


def test_the_demo_pictures_are_there() -> None:
    assert len(list(demo_images().glob("*.png"))) == 5


def test_what_it_says_at_its_end_is_true_of_its_mug() -> None:
    from looks import COLOURS, DEMO, SUBJECTS

    def word(colour: tuple[int, int, int]) -> str:
        return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], colour, strict=True)))

    look = SUBJECTS[DEMO]
    assert (look.kind, look.pattern, look.second) == ("mug", "striped", None)
    assert f"with {word(look.mark)} stripes and a {word(look.logo_colour)} {look.logo}" in demo.LOOK


@pytest.mark.parametrize("name", ["demo", "demo-full"])
def test_its_recipe_finds_the_pictures_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come with the package; a folder of that name here wins, and so does what is typed."""
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name).data.photos == demo_images()
    assert load_recipe(name, ["data.photos=mine"]).data.photos == tmp_path / "mine"
    own = tmp_path / "examples" / "subject_mug"
    own.mkdir(parents=True)
    assert load_recipe(name).data.photos == own


def test_torchs_threads_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error too."""
    monkeypatch.setattr(demo, "train", lambda *_: inside.append(torch.get_num_threads()) or 1 / 0)
    before, inside = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with pytest.raises(ZeroDivisionError):
            run_demo(None, print)
        assert (inside, torch.get_num_threads()) == ([2], 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_the_demo_teaches_the_mug(tmp_path: Path) -> None:
    import judge
    from looks import DEMO, SUBJECTS

    lines: list[str] = []
    run = run_demo(tmp_path / "demo", lines.append)
    known = judge.load_judge()

    def drawn(when: str, prompt: int) -> list[Image.Image]:
        return [
            Image.open(file).convert("RGB") for file in sorted((run / "samples" / when).glob(f"{prompt:02d}-*.png"))
        ]

    def share(when: str, prompt: int) -> float:
        found = judge.is_subject(known, drawn(when, prompt), SUBJECTS[DEMO])
        return sum(found) / len(found)

    subject, beach, snow, plain = range(4)
    assert share("before", subject) == 0
    assert share("after", subject) >= 0.75
    assert share("after", plain) <= 0.25
    for prompt, place in ((beach, "beach"), (snow, "snow")):
        seen = judge.look_at(known, drawn("after", prompt))
        assert sum(one.word("place") == place for one in seen) >= 3
    exported = json.loads((run / "exports.json").read_text())
    assert all(check.startswith("ok: ") for item in exported for check in item["checks"])
    assert any("report.html" in line for line in lines)
