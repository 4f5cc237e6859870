"""`check` names faces that the photo's edge or a square crop cuts, with OpenCV, and says when it can't look."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import SHARED
from PIL import Image, ImageDraw, ImageFilter

from data_tools.__main__ import main
from data_tools.check import check
from data_tools.faces import load_faces

GREY = (120, 130, 140)
SIDE = 200
CAR = SHARED / "photos" / "rc_car" / "00.jpg"


def face() -> Image.Image:
    """A drawn face with shadows where a real one has them: that is what the cascades look for."""
    unit = SIDE * 4 / 100
    image = Image.new("RGB", (4 * SIDE, 4 * SIDE), GREY)
    draw = ImageDraw.Draw(image)

    def ellipse(middle: tuple[float, float], radii: tuple[float, float], colour: tuple[int, int, int]) -> None:
        (x, y), (width, height) = middle, radii
        box = ((x - width) * unit, (y - height) * unit, (x + width) * unit, (y + height) * unit)
        draw.ellipse(box, fill=colour)

    ellipse((50, 45), (34, 44), (60, 40, 30))
    ellipse((50, 52), (27, 38), (225, 180, 150))
    for x in (38, 62):
        ellipse((x, 44), (8, 5), (150, 105, 85))
        ellipse((x, 45), (6, 3), (235, 230, 225))
        ellipse((x, 45), (3, 3), (30, 20, 20))
        draw.line(((x - 8) * unit, 38 * unit, (x + 8) * unit, 38 * unit), fill=(60, 40, 30), width=round(3 * unit))
    draw.polygon([(50 * unit, 46 * unit), (45 * unit, 62 * unit), (55 * unit, 62 * unit)], fill=(240, 200, 170))
    ellipse((50, 63), (6, 2), (170, 120, 100))
    ellipse((50, 74), (11, 3.2), (150, 60, 60))
    return image.filter(ImageFilter.GaussianBlur(unit)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def photo(place: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    made = Image.new("RGB", size, GREY)
    made.paste(face(), place)
    return made


def said(folder: Path) -> list[str]:
    return [text for file in check(folder, 64).files for text in file.problems if "face" in text]


@pytest.mark.parametrize(
    ("place", "size", "words"),
    [
        ((140, 60), (480, 320), []),
        ((-62, 60), (320, 320), ["a face is cut at the left edge"]),
        ((182, 60), (320, 320), ["a face is cut at the right edge"]),
        ((60, -66), (320, 320), ["a face is cut at the top edge"]),
        ((60, 175), (320, 320), ["a face is cut at the bottom edge"]),
        ((20, 60), (640, 320), ["the square crop of training keeps 23% of a face"]),
    ],
)
def test_a_cut_face_is_named(place: tuple[int, int], size: tuple[int, int], words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="the extra faces (OpenCV) is not installed")
    photo(place, size).save(tmp_path / "a.png")
    assert [text.split(":")[0] for text in said(tmp_path)] == words


def test_a_crop_around_the_subject_that_cuts_a_face_is_named(tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="the extra faces (OpenCV) is not installed")
    photo((240, 60), (680, 320)).save(tmp_path / "a.png")
    mask = Image.new("L", (680, 320))
    mask.paste(255, (20, 60, 120, 260))  # the subject is a thing beside the person
    mask.save(tmp_path / "a.mask.png")
    assert said(tmp_path) == ["a square crop around the subject, as data crop makes it, keeps 36% of a face"]


@pytest.mark.skipif(not CAR.is_file(), reason="the DreamBooth photos are not here")
def test_the_face_of_a_real_toy(tmp_path: Path) -> None:
    """The driver of the toy car, in a photo that a person took. Its face is at 222 to 275 of 512, 179 to 232 down."""
    pytest.importorskip("cv2", reason="the extra faces (OpenCV) is not installed")
    image = Image.open(CAR).convert("RGB")
    unit = image.width / 512
    faces, why_not = load_faces()
    assert faces is not None, why_not
    (box,) = faces.find(image)
    assert [round(512 * share) for share in box] == pytest.approx([222, 179, 275, 232], abs=8)
    image.crop((0, round(187 * unit), image.width, image.height)).save(tmp_path / "cut.png")
    assert said(tmp_path)[0] == "a face is cut at the top edge"


@pytest.mark.skipif(not CAR.is_file(), reason="the DreamBooth photos are not here")
@pytest.mark.slow
def test_photos_without_people_have_no_cut_face() -> None:
    pytest.importorskip("cv2", reason="the extra faces (OpenCV) is not installed")
    subjects = [folder for folder in sorted((SHARED / "photos").iterdir()) if folder.is_dir()]
    assert {folder.name: said(folder) for folder in subjects} == {folder.name: [] for folder in subjects}


@pytest.mark.parametrize("absent", [None, ModuleType("cv2")])
def test_without_cascades_one_line_says_so(
    absent: object, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None: no OpenCV is installed. Another module: OpenCV 5, which has no class for cascades."""
    monkeypatch.setitem(sys.modules, "cv2", absent)
    main(["check", str(photos), "--resolution", "16", "--json"])
    (note,) = [note for note in json.loads(capsys.readouterr().out)["notes"] if "faces" in note]
    assert "pip install 'finetune-diffusion[faces]'" in note
    assert main(["sheet", str(photos), str(tmp_path / "out"), "--resolution", "16"]) == 0
    assert "faces were not looked for" in (tmp_path / "out" / "index.html").read_text()
