"""`check` sees lettering that is printed over one photo, and none where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import SHARED
from PIL import Image, ImageDraw, ImageFont
from test_findings_of_a_set import drawing, texture

from data_tools.check import check
from data_tools.lettering import find_lines

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HELD_OUT = ("duck_toy", "rc_car", "red_cartoon", "teapot", "vase")


def lettered(words: str, place: tuple[int, int], strength: float, size: int = 16) -> Image.Image:
    photo = texture()
    layer = Image.new("L", photo.size)
    ImageDraw.Draw(layer).text(place, words, fill=round(255 * strength), font=ImageFont.load_default(size))
    return Image.composite(Image.new("RGB", photo.size, "white"), photo, layer)


def test_photos_and_drawings_without_lettering_have_none() -> None:
    assert [find_lines(image) for image in (*map(texture, range(8)), drawing(), drawing(1))] == [[]] * 10


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_mark_at_an_edge_is_a_problem(strength: float, tmp_path: Path) -> None:
    lettered("(c) Jane Doe 2024", (170, 292), strength).save(tmp_path / "a.png")
    (told,) = check(tmp_path, 256).files[0].problems
    assert told == "lettering at the bottom right, such as a watermark or a date: crop it away, or mask it"


def test_lettering_in_the_middle_is_a_note_since_it_may_be_the_subjects(tmp_path: Path) -> None:
    lettered("STRAWBERRY", (110, 150), 1.0).save(tmp_path / "a.png")
    (file,) = check(tmp_path, 256).files
    assert file.problems == []
    assert [note for note in file.notes if note.startswith("lettering in the middle")]


def test_the_line_is_where_it_was_printed() -> None:
    left, top, right, bottom = find_lines(lettered("(c) Jane Doe 2024", (20, 20), 1.0))[0].box
    assert (left, top) == pytest.approx((20 / 320, 23 / 320), abs=0.03)
    assert right == pytest.approx(150 / 320, abs=0.06)
    assert bottom < 45 / 320


@pytest.mark.skipif(not (SHARED / "photos").is_dir(), reason="the DreamBooth photos are not here")
@pytest.mark.slow
def test_real_photos_of_subjects_that_set_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/data.md: none of 24 is named without lettering, and 76 % with words printed over them, opaque."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from lettering import SIZES, Print, read_photos

    sys.modules.pop("lettering")
    photos = list(read_photos(SHARED / "photos", tuning=False))
    assert {name.split("/")[0] for name, _ in photos} == set(HELD_OUT)
    assert [name for name, photo in photos if find_lines(photo)] == []
    prints = [Print(SIZES[number % len(SIZES)], 1.0, number) for number in range(len(photos))]
    found = sum(bool(find_lines(each.over(photo))) for each, (_, photo) in zip(prints, photos, strict=True))
    assert found >= 0.6 * len(photos)
