"""What only a set of photos shows: that all have one background, or one mark at the same place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

MOST = 64  # photos that are compared with each other
FEWEST = 4  # fewer photos may be alike by chance
RING = 3  # of 16 pixels: the edge of a small image, where a subject seldom is
SAME_RING = 9.0  # of 255: the mean difference of two edges that show one background
SHARE = 0.8  # of the pairs
SIDE = 192  # pixels: of the images in which marks are sought
FEWEST_MARKED = 8
AGREE = 10  # percent of the photos may lack the mark
EDGE = 8.0  # of 255: a step that the others have at the same place, in the same direction
SMALLEST_MARK, LARGEST_MARK = 24, 0.25  # pixels of such steps, and the part of the image around them


def thumb_of(image: Image.Image) -> np.ndarray:
    """A grey image [192, 192], uint8: marks are at the same place of photos of any size."""
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=3.0)
    return np.asarray(small.convert("L"), dtype=np.uint8)


def same_background(smalls: Sequence[np.ndarray]) -> list[str]:
    """A sentence if nearly all photos [16, 16, 3] have the same edge, else nothing."""
    if len(smalls) < FEWEST:
        return []
    inner = np.zeros(smalls[0].shape[:2], dtype=bool)
    inner[RING:-RING, RING:-RING] = True
    edges = np.stack([small[~inner] for small in smalls[:MOST]]).astype(np.float32)
    apart = np.abs(edges[:, None] - edges[None]).mean((2, 3))
    pairs = apart[np.triu_indices(len(edges), 1)]
    if float((pairs <= SAME_RING).mean()) < SHARE:
        return []
    return ["all photos have the same background, which is learned with the subject: add photos in other places"]


def same_mark(thumbs: Sequence[np.ndarray]) -> list[str]:
    """A sentence if a small place has the same steps in most photos, as a watermark, a date or a logo has.

    After Dekel et al. 2017, "On the Effectiveness of Visible Watermarks": over many photos, only the gradients of what
    they share agree.
    """
    if len(thumbs) < FEWEST_MARKED:
        return []
    grey = np.stack(thumbs[:MOST]).astype(np.float32)
    down = _shared_steps(np.diff(grey, axis=1))[:, :-1]
    right = _shared_steps(np.diff(grey, axis=2))[:-1]
    rows, columns = np.nonzero(np.maximum(down, right) > EDGE)
    if len(rows) < SMALLEST_MARK:
        return []
    top, bottom = np.percentile(rows, (5, 95))
    left, end = np.percentile(columns, (5, 95))
    if (bottom - top + 1) * (end - left + 1) > LARGEST_MARK * SIDE**2:
        return []
    place = place_of(float(top + bottom) / 2 / SIDE, float(left + end) / 2 / SIDE)
    if place == "middle":  # a subject is there, perhaps always in the same pose
        return []
    return [f"most photos have the same mark at the {place}, such as a watermark or a date: crop it away, or mask it"]


def _shared_steps(steps: np.ndarray) -> np.ndarray:
    """How large the steps [photos, rows, columns] are at least in all but AGREE percent of the photos, 0 where their
    directions differ."""
    low, high = np.percentile(steps, (AGREE, 100 - AGREE), axis=0)
    shared: np.ndarray = np.maximum(np.maximum(low, -high), 0)
    return shared


def place_of(down: float, right: float) -> str:
    """The words for a place in a photo, by its middle as shares of the sides: middle, top left, bottom, ..."""
    vertical = "top" if down < 1 / 3 else "bottom" if down > 2 / 3 else "middle"
    across = " left" if right < 1 / 3 else " right" if right > 2 / 3 else ""
    return f"{vertical}{across}"
