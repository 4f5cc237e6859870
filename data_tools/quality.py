"""Measures of one photo that need no network: sharpness, exposure, blocks of JPEG compression, bars at the edges.

Each measure says what it looks at; the limits of `faults` were set on six subjects and checked on five others
(docs/data.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

SMALLEST = 64  # pixels: of a smaller image nothing is measured
TILES = 8  # tiles along the shorter side: one sharp place is enough, for backgrounds may be out of focus
FLAT = 16.0  # of 255 squared: a tile whose mean squared gradient is smaller says nothing of sharpness

BLURRED = 0.50  # sharpness of a photo that is out of focus, or enlarged from a smaller one
DARK, BRIGHT, PALE = 40, 215, 20  # of 255: brightest and darkest five percent, and their distance
BLOCKY, STEP = 2.2, 1.5  # steps at the edges of 8x8 blocks, relative to those inside, and beyond those, of 255
BAR = 0.03  # of a side: thinner bars are frames or chance
BAR_NOISE = 6.0  # of 255: a bar is of one colour
BAR_EDGE = 0.6  # of the bar's length: its edge is straight


@dataclass(frozen=True)
class Quality:
    """What was measured of one photo.

    `sharpness` is near 0 for a photo out of focus and above 0.7 for a sharp one. `low` and `high` are the luma below
    which 5 percent and 95 percent of the pixels lie (0 to 255). `blocks` is 1 without visible 8x8 blocks, and
    `block_step` about 0. `bars` are the shares of the sides (left, top, right, bottom) that bars of one colour cover.
    """

    sharpness: float
    low: float
    high: float
    blocks: float
    block_step: float
    bars: tuple[float, ...]


def measure(image: Image.Image, resolution: int) -> Quality | None:
    """Measures an upright RGB image as it is trained at `resolution` pixels; None if it is too small."""
    if min(image.size) < SMALLEST:
        return None
    grey = image.convert("L")
    values = np.asarray(grey, dtype=np.float32)
    low, high = np.percentile(values[::2, ::2], (5, 95))
    bars = find_bars(np.asarray(image))
    blocks, step = blockiness(values)
    return Quality(sharpness(_inner(grey, bars), resolution), float(low), float(high), blocks, step, bars)


def faults(quality: Quality) -> list[str]:
    """What is wrong with a photo, in words."""
    found = []
    if quality.high < DARK:
        found.append(f"too dark: 95% of it is below {quality.high:.0f} of 255")
    elif quality.low > BRIGHT:
        found.append(f"too bright: 95% of it is above {quality.low:.0f} of 255")
    elif quality.high - quality.low < PALE:
        found.append(f"hardly any contrast: its values span {quality.high - quality.low:.0f} of 255")
    elif quality.sharpness < BLURRED:
        found.append(f"blurred: no part of it is sharp (sharpness {quality.sharpness:.2f}, {BLURRED:g} is needed)")
    if quality.blocks > BLOCKY and quality.block_step > STEP:
        found.append(f"JPEG blocks: steps at the 8x8 edges are {quality.blocks:.1f} times those inside")
    names = ("left", "top", "right", "bottom")
    bars = [f"{share:.0%} {name}" for share, name in zip(quality.bars, names, strict=True) if share]
    if bars:
        found.append(f"bars of one colour at the edges: {', '.join(bars)}")
    return found


def sharpness(grey: Image.Image, resolution: int) -> float:
    """How much of the gradients' energy a slight blur takes away, in the sharpest tenth of the tiles (0 to 1).

    After Crete et al. 2007, "The blur effect": what is blurred already changes little when it is blurred again. The
    gradients are squared here: the sum of a single clean edge's gradients, as drawings have them, stays the same.
    """
    scale = min(1.0, resolution / min(grey.size))
    size = (max(1, round(grey.width * scale)), max(1, round(grey.height * scale)))
    small = grey.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0) if scale < 1 else grey
    before = _tiles(_gradients(small))
    after = _tiles(_gradients(small.filter(ImageFilter.GaussianBlur(1.5))))
    telling = before > FLAT
    if not telling.any():
        return 1.0
    return float(np.percentile(1 - after[telling] / before[telling], 90))


def _gradients(image: Image.Image) -> np.ndarray:
    values = np.asarray(image, dtype=np.float32)
    return np.diff(values, axis=0)[:, :-1] ** 2 + np.diff(values, axis=1)[:-1] ** 2


def _tiles(values: np.ndarray) -> np.ndarray:
    """The means of square tiles, flat."""
    side = max(8, min(values.shape) // TILES)
    rows, columns = values.shape[0] // side, values.shape[1] // side
    means: np.ndarray = values[: rows * side, : columns * side].reshape(rows, side, columns, side).mean((1, 3))
    return means.ravel()


def blockiness(values: np.ndarray) -> tuple[float, float]:
    """How much larger the steps at multiples of 8 pixels are than elsewhere: the ratio, and the difference of 255.

    Of both directions the smaller ratio counts: stripes have one direction.
    """
    return min(_steps(values), _steps(values.T))


def _steps(values: np.ndarray) -> tuple[float, float]:
    step = np.abs(np.diff(values, axis=1)).mean(0)
    by_place = step[: len(step) // 8 * 8].reshape(-1, 8).mean(0)
    edge, inside = float(by_place[7]), float(np.median(by_place[:7]))
    return edge / max(inside, 0.25), edge - inside


def find_bars(values: np.ndarray) -> tuple[float, ...]:
    """The shares (left, top, right, bottom) of the sides that bars of one colour cover, each 0 if there is none.

    A bar ends at a straight edge: a subject on a plain background has none. Bars come in pairs.
    """
    views = (values.transpose(1, 0, 2), values, values.transpose(1, 0, 2)[::-1], values[::-1])
    left, top, right, bottom = (_bar(view) for view in views)
    across = (left, right) if left and right else (0.0, 0.0)
    down = (top, bottom) if top and bottom else (0.0, 0.0)
    return (across[0], down[0], across[1], down[1])


def _bar(rows: np.ndarray) -> float:
    """The share of the rows from the first on that are one colour, if the next row differs along most of it."""
    colour = np.median(rows[0].astype(np.float32), axis=0)
    limit = len(rows) // 2
    least = min(limit, math.ceil(BAR * len(rows)))
    if (_apart(rows[:least], colour).mean(1) > BAR_NOISE).any():  # nearly all photos: the rest needs no look
        return 0.0
    apart = _apart(rows[:limit], colour)
    plain = apart.mean(1) <= BAR_NOISE
    end = int(np.argmin(plain)) if not plain.all() else 0
    if end < BAR * len(rows):
        return 0.0
    after = apart[min(end + 2, limit - 1)]  # compression softens the edge itself
    return end / len(rows) if float((after > 3 * BAR_NOISE).mean()) >= BAR_EDGE else 0.0


def _apart(rows: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """The largest difference of each pixel's three values from `colour`, [rows, columns]."""
    red, green, blue = (np.abs(rows[..., each].astype(np.float32) - colour[each]) for each in range(3))
    return np.asarray(np.maximum(np.maximum(red, green), blue))


def _inner(grey: Image.Image, bars: tuple[float, ...]) -> Image.Image:
    """The image without its bars, whose edges are always sharp."""
    left, top, right, bottom = bars
    width, height = grey.size
    box = (int(left * width) + 2, int(top * height) + 2, int((1 - right) * width) - 2, int((1 - bottom) * height) - 2)
    return grey.crop(box) if any(bars) else grey
