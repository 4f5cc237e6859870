"""Views as arithmetic, and their pixels against Pillow's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.data import crops as module
from finetune.data.crops import enlarged, make_crops
from finetune.data.photos import Photo, scan

SHARED = Path(__file__).parents[2] / ".." / "shared" / "photos"


def photo(width: int, height: int, digest: str = "d") -> Photo:
    return Photo(Path("x.png"), (width, height), digest)


@pytest.mark.parametrize("size", [(640, 480), (481, 999), (512, 512), (100, 37), (513, 512), (3000, 151)])
@pytest.mark.parametrize("resolution", [64, 512])
def test_a_view_fits_its_photo(size: tuple[int, int], resolution: int) -> None:
    for view in make_crops(photo(*size), resolution, "random", 5, True, 1):
        assert min(view.resized) == resolution
        assert view.resized[0] / view.resized[1] == pytest.approx(size[0] / size[1], rel=1 / resolution)
        top, left = view.geometry.crop
        assert 0 <= left <= view.resized[0] - resolution
        assert 0 <= top <= view.resized[1] - resolution
        assert view.geometry.original == (size[1], size[0])
        assert view.geometry.target == (resolution, resolution)


def test_random_crops_cover_the_photo_and_differ_between_photos() -> None:
    lefts = [view.corner[0] for view in make_crops(photo(3000, 1000), 100, "random", 200, False, 0)]
    assert min(lefts) < 10
    assert max(lefts) > 190
    assert make_crops(photo(300, 100), 10, "random", 4, False, 0) != make_crops(
        photo(300, 100, "e"), 10, "random", 4, False, 0
    )


def test_a_mirrored_view_names_the_crop_of_the_mirrored_photo(photos: Path) -> None:
    """SDXL reads the crop's corner in the picture as it is shown: mirror the photo first, then crop there."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "0.png")
    for plain, mirrored in zip(*[iter(make_crops(scan(photos)[0], 20, "random", 3, True, 0))] * 2, strict=True):
        shown = module._resized(plain.photo, plain.resized).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        top, left = mirrored.geometry.crop
        assert np.array_equal(np.asarray(mirrored.image()), np.asarray(shown.crop((left, top, left + 20, top + 20))))


def test_keys_tell_every_view_apart() -> None:
    made = [v for resolution in (64, 96) for v in make_crops(photo(300, 100), resolution, "random", 6, True, 0)]
    made += make_crops(photo(300, 100, "e"), 64, "center", 1, True, 0)
    assert len({view.key for view in made}) == len(set(made)) == len(made)


def test_pixels_span_minus_one_to_one(tmp_path: Path) -> None:
    Image.fromarray(np.tile(np.array([[0, 255], [51, 204]], np.uint8), (8, 8))).save(tmp_path / "a.png")
    pixels = make_crops(scan(tmp_path)[0], 16, "center", 1, False, 0)[0].pixels()
    assert pixels[0, :2, :2].flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6, 0.6], abs=1e-6)


def test_enlarged_photos_are_named(photos: Path) -> None:
    assert enlarged(scan(photos), 40) is None
    assert "3 of 3 photos are enlarged to 64 pixels" in str(enlarged(scan(photos), 64))
    assert "48x40" in str(enlarged(scan(photos), 64))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real photos beside the checkout are not there")
def test_real_photos() -> None:
    for item in scan(SHARED / "dog"):
        (view,) = make_crops(item, 64, "center", 1, False, 0)
        assert view.pixels().std() > 0.1
