"""The measure of a style against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from finetune.report.style_distance import distance, lab, share_of_style, sliced


def textured(seed: int = 0, side: int = 32) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def recoloured(image: Image.Image) -> Image.Image:
    """Red and blue changed places."""
    return Image.fromarray(np.asarray(image)[..., ::-1].copy())


def shuffled(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    return Image.fromarray(np.random.default_rng(1).permutation(pixels.reshape(-1, 3)).reshape(pixels.shape))


def grey(level: int, side: int = 16) -> Image.Image:
    return Image.new("RGB", (side, side), (level, level, level))


@pytest.mark.parametrize(
    ("colour", "expected"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0, 0)),
    ],
)
def test_lab_of_published_colours(colour: tuple[int, int, int], expected: tuple[float, float, float]) -> None:
    """Values of Lindbloom's calculator (sRGB, D65)."""
    assert lab(np.array(colour, np.uint8)) == pytest.approx(np.array(expected), abs=0.03)


def test_the_same_images_have_no_distance_in_any_order_or_number() -> None:
    images = [textured(seed) for seed in range(3)]
    for others in (images, images[::-1], images * 2):
        found = distance(images, others)
        assert found.colours == pytest.approx(0, abs=1e-9)
        assert found.strokes == pytest.approx(0, abs=1e-9)


def test_a_shift_of_every_point_has_the_distance_of_its_mean_projection() -> None:
    """Moved by a vector v, a cloud is |v . direction| away in each direction: in 3 dimensions |v|/2 on average."""
    points = np.random.default_rng(0).standard_normal((500, 3))
    assert sliced(points, points + np.array([0, 8.0, 0])) == pytest.approx(4, rel=0.15)
    one, two = (distance([grey(119)], [grey(level)]).colours for level in (143, 166))  # L 50, 59.6, 68.6
    assert two / one == pytest.approx((68.6 - 50.03) / (59.6 - 50.03), rel=0.02)
    assert distance([grey(119)], [grey(166)]).strokes == pytest.approx(0, abs=1e-9)


def test_colours_and_strokes_are_told_apart() -> None:
    image = textured()
    moved = distance([image], [shuffled(image)])
    assert moved.colours == pytest.approx(0, abs=1e-9)
    assert moved.strokes > 2
    tinted = distance([grey(128)], [Image.new("RGB", (16, 16), (200, 90, 90))])
    assert tinted.colours > 5
    assert tinted.strokes == pytest.approx(0, abs=1e-9)
    assert distance([image], [recoloured(image)]).colours > 2


def test_the_direction_of_strokes_counts() -> None:
    stripes = Image.fromarray(np.tile(np.array([[40], [200]], np.uint8), (16, 32))[:32]).convert("RGB")
    stripes = stripes.resize((128, 128), Image.Resampling.NEAREST)
    turned = stripes.transpose(Image.Transpose.ROTATE_90)
    assert distance([stripes], [turned]).colours == pytest.approx(0, abs=1e-9)
    assert distance([stripes], [turned]).strokes > 1


def test_a_larger_copy_is_the_same_image() -> None:
    image = textured(side=48)
    larger = image.resize((192, 192), Image.Resampling.NEAREST)
    assert distance([image], [larger]).whole == pytest.approx(0, abs=1e-6)


def test_the_share_is_0_for_plain_images_1_for_the_drawings_and_between_for_a_mixture() -> None:
    plain, drawings = [textured(n) for n in range(3)], [shuffled(textured(n)) for n in range(3)]
    assert share_of_style(plain, plain, drawings) == pytest.approx(0, abs=1e-9)
    assert share_of_style(drawings, plain, drawings) == pytest.approx(1, abs=1e-9)
    half = share_of_style([*plain, *drawings], plain, drawings)
    assert 0.3 < half < 0.7
    assert share_of_style([grey(0), grey(255)], plain, drawings) < half
