"""Wide-gamut files become sRGB, against the matrices of the standards; sRGB files keep their exact values."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from finetune.data.colours import converted_to_srgb
from finetune.data.crops import make_crops
from finetune.data.decoding import open_image
from finetune.data.photos import read_photo

# Linear RGB -> XYZ adapted to D50, as profiles store it; from the primaries of IEC 61966-2-1 and SMPTE EG 432-1 (P3).
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
P3 = np.array([[0.5151, 0.2919, 0.1572], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
GAMMA = 2.19921875  # of Adobe RGB (1998)


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(space: bytes = b"RGB ", matrix: np.ndarray = P3, gamma: float = GAMMA) -> bytes:
    """An ICC v2 profile of a screen: three primaries and a gamma, or (GRAY) a gamma alone."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642) + fixed(1.0) + fixed(0.8249)}
    tags[b"desc"] = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(80)
    tags[b"cprt"] = b"text" + bytes(4) + b"none\0" + bytes(3)
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for column, name in enumerate((b"r", b"g", b"b")):
            tags[name + b"XYZ"] = b"XYZ " + bytes(4) + b"".join(fixed(value) for value in matrix[:, column])
            tags[name + b"TRC"] = curve
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12s4s", start + len(body), bytes(4), 0x02400000, b"mntr", space, b"XYZ ", bytes(12), b"acsp"
    )
    white = fixed(0.9642) + fixed(1.0) + fixed(0.8249)
    return (head + bytes(28) + white + bytes(48))[:128].ljust(128, b"\0") + table + body


def expected(colour: tuple[int, int, int]) -> np.ndarray:
    linear = np.linalg.inv(SRGB) @ P3 @ (np.array(colour) / 255) ** GAMMA
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
@pytest.mark.parametrize("colour", [(200, 60, 40), (60, 160, 90), (128, 128, 128)])
def test_a_wide_gamut_becomes_srgb(tmp_path: Path, colour: tuple[int, int, int], suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    exact = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    Image.new("RGB", (32, 32), colour).save(file, icc_profile=profile(), **exact)
    assert np.abs(np.array(open_image(file).getpixel((9, 9))) - expected(colour)).max() <= 3
    assert read_photo(file).recoloured


def test_srgb_under_any_name_keeps_its_values(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    ours = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for held in (None, ours, b"damaged", profile()[:200], profile(b"GRAY")[:140]):
        Image.fromarray(noise).save(tmp_path / "a.png", **({"icc_profile": held} if held else {}))
        assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), noise)
        assert not read_photo(tmp_path / "a.png").recoloured


def test_grey_deep_and_transparent_files_with_a_profile(tmp_path: Path) -> None:
    """A grey of gamma 1 is much lighter in sRGB; opacity is not a colour."""
    linear = profile(b"GRAY", gamma=1.0)
    light = 255 * (1.055 * (64 / 255) ** (1 / 2.4) - 0.055)
    Image.new("L", (20, 20), 64).save(tmp_path / "grey.png", icc_profile=linear)
    Image.fromarray(np.full((20, 20), 64 * 257, np.uint16)).save(tmp_path / "deep.png", icc_profile=linear)
    for name in ("grey.png", "deep.png"):
        assert abs(open_image(tmp_path / name).getpixel((3, 3))[0] - light) <= 2, name
    image = Image.new("RGBA", (20, 20), (200, 60, 40, 255))
    image.paste((0, 0, 0, 0), (0, 0, 10, 20))
    image.save(tmp_path / "clear.png", icc_profile=profile())
    shown = open_image(tmp_path / "clear.png")
    assert shown.getpixel((2, 2)) == (255, 255, 255)
    assert np.abs(np.array(shown.getpixel((15, 15))) - expected((200, 60, 40))).max() <= 3


def test_lab_is_read(tmp_path: Path) -> None:
    grey = Image.new("RGB", (20, 20), (119, 119, 119))
    converted = ImageCms.profileToProfile(
        grey, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    converted.save(tmp_path / "a.tiff")
    assert np.abs(np.array(open_image(tmp_path / "a.tiff").getpixel((4, 4)), np.int16) - 119).max() <= 3


def test_a_profile_of_another_kind_of_image_is_not_applied() -> None:
    image = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert converted_to_srgb(image, profile()) is image


def test_a_cache_of_the_wrong_colours_is_not_used_again(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (200, 60, 40)).save(tmp_path / "a.png", icc_profile=profile())
    photo = read_photo(tmp_path / "a.png")
    (crop,) = make_crops(photo, 16, "center", 1, False, 0)
    (older,) = make_crops(type(photo)(photo.path, photo.size, photo.digest), 16, "center", 1, False, 0)
    assert crop.key != older.key
