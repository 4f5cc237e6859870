"""Each trap of picture files, against what was drawn into the file or what Pillow itself gives."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.core.errors import BadInput
from finetune.data import photos
from finetune.data.decoding import BadImage, open_image
from finetune.data.photos import read_photo, scan

ROTATED = Image.Exif()
ROTATED[0x0112] = 6


@pytest.fixture
def corner() -> Image.Image:
    """40x20, black, with a red left quarter."""
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 0, 0), (0, 0, 10, 20))
    return image


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_every_format_is_turned_upright_once(tmp_path: Path, corner: Image.Image, suffix: str) -> None:
    """Pillow turns a TIFF while it loads it and the others not at all."""
    file = tmp_path / f"a.{suffix}"
    corner.save(file, exif=ROTATED)
    upright = open_image(file)
    assert read_photo(file).size == upright.size == (20, 40)
    assert upright.getpixel((10, 3))[0] > 200 > 50 > upright.getpixel((10, 30))[0]


@pytest.mark.parametrize("suffix", sorted(photos.SUFFIXES))
def test_every_format_is_read(tmp_path: Path, corner: Image.Image, suffix: str) -> None:
    corner.save(tmp_path / f"a{suffix}")
    (photo,) = scan(tmp_path)
    assert photo.size == (40, 20)
    assert photo.digest == hashlib.sha256(photo.path.read_bytes()).hexdigest()
    red, green, blue = open_image(photo.path).getpixel((3, 10))
    assert red > 200 > 60 > max(green, blue)


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").getpixel((8, 8)) == (255, 0, 0)


def test_a_dark_16_bit_picture_stays_dark(tmp_path: Path) -> None:
    """200 of 65,535 is black; taken for 8 bits it would be light grey."""
    Image.fromarray(np.full((8, 8), 200, np.uint16)).save(tmp_path / "dark.png")
    assert open_image(tmp_path / "dark.png").getpixel((4, 4)) == (1, 1, 1)


def test_float_palette_grey_and_cmyk(tmp_path: Path) -> None:
    ramp = np.linspace(-3.0, 5.0, 9, dtype=np.float32).reshape(3, 3)
    Image.fromarray(ramp).save(tmp_path / "float.tiff")
    assert [open_image(tmp_path / "float.tiff").getpixel(at)[0] for at in ((0, 0), (1, 1), (2, 2))] == [0, 128, 255]
    Image.new("RGB", (8, 8), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    assert open_image(tmp_path / "palette.png").getpixel((1, 1)) == (10, 200, 30)
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").getpixel((1, 1)) == (77, 77, 77)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tiff")
    assert open_image(tmp_path / "cmyk.tiff").getpixel((1, 1)) == (255, 0, 0)


def test_a_transparent_palette_colour_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", transparency=0)
    assert open_image(tmp_path / "a.png").getpixel((1, 1)) == (255, 255, 255)


def test_reasons_say_what_is_wrong(tmp_path: Path, corner: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    corner.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-200])
    (tmp_path / "text.png").write_text("hello")
    Image.new("RGB", (800, 20)).save(tmp_path / "strip.png")
    with pytest.raises(BadInput) as caught:
        scan(tmp_path)
    for reason in ("cut.jpg (truncated)", "text.png (not an image", "strip.png (800x20 is more than 20 times"):
        assert reason in str(caught.value)
    corner.save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(BadImage, match="more than 600 pixels"):
        open_image(tmp_path / "bomb.png")


def test_a_file_that_has_gone_since_the_scan(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        open_image(tmp_path / "gone.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_damaged_bytes_never_end_in_a_traceback(tmp_path: Path, kind: str) -> None:
    source = Image.effect_noise((48, 32), 80).convert("P" if kind == "GIF" else "RGB")
    file = tmp_path / f"a.{kind.lower()}"
    source.save(file, kind)
    whole, rng, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(whole[: rng.choice([len(whole), rng.randrange(1, len(whole))])])
        for _ in range(rng.choice([1, 8])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            read_photo(file)
        except BadImage:
            refused += 1
    assert refused > 10


def test_files_that_are_no_pictures_are_passed_over(photos: Path) -> None:
    (photos / "notes.md").write_text("x")
    (photos / ".hidden.png").write_bytes(b"x")
    (photos / "more.png").mkdir()
    assert [photo.path.name for photo in scan(photos)] == ["0.png", "1.png", "2.png"]


def test_photos_one_folder_deeper_are_pointed_at(tmp_path: Path, corner: Image.Image) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "dog").mkdir()
    corner.save(tmp_path / "dog" / "0.png")
    with pytest.raises(BadInput, match=r"holds no images .*; there are some in its folder 'dog'$"):
        scan(tmp_path)
    (tmp_path / "dog" / "0.png").unlink()
    with pytest.raises(BadInput, match=r"give the folder with the photos$"):
        scan(tmp_path)
