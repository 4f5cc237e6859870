"""Hints of the plan about photos that `data crop` and `data mask` would help."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from finetune.cli.main import run
from finetune.config.load import load_recipe
from finetune.jobs.hints import photo_hints, thumbnail


def write(folder: Path, name: str, at: tuple[int, int, int, int]) -> None:
    """A red oval on grey, 360 x 240."""
    image = Image.new("RGB", (360, 240), (90, 100, 110))
    ImageDraw.Draw(image).ellipse(at, fill=(220, 40, 30))
    image.save(folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "set"
    place.mkdir()
    write(place, "a.jpg", (120, 60, 240, 180))  # good
    write(place, "b.jpg", (10, 60, 110, 180))  # half outside of the square at the middle
    write(place, "c.png", (160, 100, 190, 130))  # small
    Image.new("RGB", (360, 240), "teal").save(place / "d.png")  # nothing
    (place / "e.jpg").write_bytes(b"broken")
    return place


def hints(folder: Path, *overrides: str) -> list[str]:
    return photo_hints(load_recipe("dreambooth-lora", [f"data.photos={folder}", *overrides]))


def test_each_photo_concerned_gets_a_line(folder: Path) -> None:
    cut, small = hints(folder)
    assert cut.startswith("b.jpg: the square crop at the middle keeps 50%")
    assert cut.endswith("finetune data crop moves it")
    assert small.startswith("c.png: its subject fills 1% of it")
    assert "finetune data mask" in small
    assert [line.split(":")[0] for line in hints(folder, "data.shape=buckets")] == ["c.png"]


def test_an_article_and_too_few_photos_are_named(folder: Path) -> None:
    """One photo was trained on a thousand times, and "a dog" was drawn as "a photo of a a dog", without a word."""
    for name in ("b.jpg", "c.png", "d.png"):
        (folder / name).unlink()
    assert hints(folder) == ["2 photos of set: take three to ten, in other places"]
    article, few = hints(folder, "data.class_noun=a dog")
    assert article.startswith("data.class_noun is 'a dog': leave 'a' out")
    assert few.startswith("2 photos")
    (folder / "e.jpg").unlink()
    assert hints(folder, "data.class_noun=ant") == ["1 photo of set: take three to ten, in other places"]


def test_steps_after_the_end_of_the_schedule_are_named(folder: Path) -> None:
    """A cosine over a tenth of the steps left the rest to a rate of 0, without a word."""
    for name in ("b.jpg", "c.png"):
        (folder / name).unlink()
    shape = ("run.steps=500", "optim.schedule=cosine")
    assert hints(folder, *shape) == hints(folder, *shape, "optim.schedule_steps=900") == []
    (idle,) = hints(folder, *shape, "optim.schedule_steps=50")
    assert idle.startswith("steps 51 to 500 have a learning rate of 0, as optim.schedule_steps is 50")


def test_a_mask_decides(folder: Path) -> None:
    Image.new("L", (360, 240), 255).save(folder / "b.mask.png")
    (folder / "masks").mkdir()
    Image.new("L", (360, 240), 255).save(folder / "masks" / "c.png")
    assert [line.split(" keeps ")[1][:3] for line in hints(folder)] == ["67%", "67%"]


def test_many_photos_are_not_looked_at_and_none_is_no_error(folder: Path, tmp_path: Path) -> None:
    assert photo_hints(load_recipe("dreambooth-lora", [f"data.photos={tmp_path / 'none'}"])) == []
    for number in range(25):
        (folder / f"{number}.jpg").write_bytes((folder / "b.jpg").read_bytes())
    assert hints(folder) == []


def test_a_sideways_photo_is_upright_when_it_is_small(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (800, 400), "white")
    image.paste((200, 0, 0), (0, 0, 100, 400))
    image.save(tmp_path / "a.jpg", exif=exif)
    small = thumbnail(tmp_path / "a.jpg")
    assert small.size == (48, 96)
    red, white = small.getpixel((24, 4)), small.getpixel((24, 90))
    assert (red[0] > 150, red[1] < 60, white[1] > 240) == (True, True, True)


@pytest.mark.slow
def test_the_plan_shows_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "dreambooth-lora", f"data.photos={folder}", "data.class_noun=mug"])[0] == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("hint")]
    assert [line.split()[1] for line in lines] == ["b.jpg:", "c.png:"]
