"""How far images are from each other in colours and strokes, whatever they show: the measure of a style.

Each set of images becomes two clouds of points, one point for each pixel: its colour, and the strokes around it. The
distance of two clouds is the sliced Wasserstein distance (Rabin et al. 2011, "Wasserstein barycenter and its
application to texture mixing"): the mean over fixed directions of the distance between sorted projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Points = NDArray[np.float64]

SIDE = 256  # pixels: larger images are made smaller
DIRECTIONS, LEVELS = 64, 200  # of a projection, and points of each sorted projection that are compared
TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.072175), (0.0193339, 0.119192, 0.9503041))
WHITE = (0.95047, 1.0, 1.08883)  # D65


@dataclass(frozen=True)
class StyleDistance:
    """Between two sets of images, in units of CIELAB. `strokes` come from the lightness alone."""

    colours: float
    strokes: float

    @property
    def whole(self) -> float:
        return float(np.hypot(self.colours, self.strokes))


def distance(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> StyleDistance:
    """Returns the distance of two sets of images. They may differ in number and size; larger images are made smaller,
    so that the shorter sides of all are equal."""
    side = min(SIDE, *(min(image.size) for image in (*images, *others)))
    one, other = ([lab(_shrunk(image, side)) for image in each] for each in (images, others))
    return StyleDistance(
        sliced(*(np.concatenate([image.reshape(-1, 3) for image in each]) for each in (one, other))),
        sliced(*(np.concatenate([strokes(image[..., 0]) for image in each]) for each in (one, other))),
    )


def share_of_style(
    images: Sequence[Image.Image], plain: Sequence[Image.Image], drawings: Sequence[Image.Image]
) -> float:
    """Returns how far images are on the way from `plain` ones (0) to `drawings` (1): 1 - d(images, drawings) /
    d(plain, drawings). Below 0 they are farther from the drawings than the plain ones are."""
    return 1 - distance(images, drawings).whole / max(distance(plain, drawings).whole, 1e-9)


def lab(pixels: NDArray[np.uint8]) -> Points:
    """sRGB [..., 3] -> CIELAB under D65 [..., 3]: L in [0, 100] (IEC 61966-2-1, CIE 15)."""
    value = pixels.astype(np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    scaled = linear @ np.array(TO_XYZ).T / np.array(WHITE)
    root = np.where(scaled > (6 / 29) ** 3, np.cbrt(scaled), scaled / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def strokes(lightness: Points) -> Points:
    """Lightness [h, w] -> [h * w, 6]: steepness here and at half the size, contrast within 5 pixels, curvature, and
    the direction of edges as steepness times the cosine and sine of twice its angle."""
    height, width = lightness.shape
    down, right = np.gradient(lightness)
    steep, twice = np.hypot(down, right), 2 * np.arctan2(down, right)
    half = np.asarray(Image.fromarray(lightness.astype(np.float32)).resize((width // 2, height // 2)), np.float64)
    coarse = np.hypot(*np.gradient(half)).astype(np.float32)
    coarse = np.asarray(Image.fromarray(coarse).resize((width, height)), np.float64)
    curved = np.abs(np.gradient(down, axis=0) + np.gradient(right, axis=1))
    found = (steep, coarse, _contrast(lightness), curved, steep * np.cos(twice), steep * np.sin(twice))
    return np.stack([each.ravel() for each in found], axis=1)


def sliced(points: Points, others: Points) -> float:
    """Returns the sliced Wasserstein-1 distance of two clouds [n, k] and [m, k]."""
    directions = np.random.default_rng(0).standard_normal((DIRECTIONS, points.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    sorted_points = (np.sort(directions @ cloud.T, axis=1) for cloud in (points, others))
    one, other = (line[:, np.ceil(levels * line.shape[1]).astype(int) - 1] for line in sorted_points)
    return float(np.abs(one - other).mean())


def _contrast(lightness: Points) -> Points:
    """The standard deviation within 5x5 pixels [h, w]; edges are repeated."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(lightness, 2, mode="edge"), (5, 5))
    contrast: Points = windows.std(axis=(2, 3))
    return contrast


def _shrunk(image: Image.Image, side: int) -> NDArray[np.uint8]:
    scale = side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX))
