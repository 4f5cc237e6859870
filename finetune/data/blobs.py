"""The connected parts of a mask: which is the main one, and the box around it."""

from __future__ import annotations

import numpy as np

PART = 0.25  # of the main part's saliency: smaller parts are something else
FAINT = 0.25  # less than this is nothing, and more than the rest to 1 is all
ROUGH = 0.03  # of a side: a box around a subject is not more certain
Box = tuple[float, float, float, float]  # left, top, right and bottom as shares of the sides


def box_of(inside: np.ndarray) -> Box | None:
    """The box around what is true in a bool array [height, width]; None if nothing is."""
    if not inside.any():
        return None
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    height, width = inside.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height


def share_in_square(box: Box, size: tuple[int, int]) -> float:
    """The share of a box that the largest square at the middle of a photo of `size` (width, height) keeps.

    Boxes are rough: what sticks out by less than three percent of a side does not count.
    """
    left, top = ((1 - min(size) / length) / 2 for length in size)
    return share_in(box, (left, top, 1 - left, 1 - top))


def share_in(box: Box, window: Box) -> float:
    """The share of a box that a window keeps, 1 for a box that sticks out of it no further than it is certain."""
    kept = 1.0
    for low, high, start, end in zip(box[:2], box[2:], window[:2], window[2:], strict=True):
        if low < start - ROUGH or high > end + ROUGH:
            kept *= max(0.0, min(high, end) - max(low, start)) / (high - low)
    return kept


def border_share(inside: np.ndarray) -> float:
    """The share of the border of a bool array [height, width] that is true."""
    return float(np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]]).mean())


def otsu(values: np.ndarray) -> float:
    """The limit that parts values in [0, 1] into two classes that differ most (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=64, range=(0, 1))
    sums = np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)
    below = np.cumsum(counts)
    above = below[-1] - below
    apart = sums / np.maximum(below, 1) - (sums[-1] - sums) / np.maximum(above, 1)
    return float(edges[1 + int(np.argmax(below * above * apart**2))])


def main_blobs(mask: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The mask [height, width] without parts that are far less salient than the main one, and without holes.

    `start` is the saliency of each pixel.
    """
    certain = mask > 0.5
    main = main_part(certain, start * mask)
    around = connected(mask > FAINT)
    near = np.isin(around, around[main & certain]) & (around > 0) & (main | ~certain)
    soft = ((mask - FAINT) / (1 - 2 * FAINT)).clip(0, 1)
    return np.where(main & ~certain, 1, np.where(near, soft, 0)).astype(np.float32)


def main_part(inside: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The connected part of a bool array [height, width] that weighs most, with others that weigh nearly as much.

    Its holes are filled.
    """
    labels = connected(inside)
    sums = np.bincount(labels.ravel(), weights=weights.ravel())
    sums[0] = 0
    kept = (sums >= PART * max(float(sums.max()), 1e-6))[labels]
    outside = connected(~kept)
    edges = np.concatenate([outside[0], outside[-1], outside[:, 0], outside[:, -1]])
    return np.asarray(kept | ~np.isin(outside, edges))


def connected(inside: np.ndarray) -> np.ndarray:
    """Numbers the connected parts (four neighbours) of a bool array from 1 on; 0 is outside, [height, width] int."""
    starts = inside & ~np.pad(inside, ((0, 0), (1, 0)))[:, :-1]
    runs = np.where(inside, np.cumsum(starts.ravel()).reshape(inside.shape), 0)
    both = inside[1:] & inside[:-1]
    roots = _roots(int(runs.max()) + 1, runs[1:][both], runs[:-1][both])
    return np.unique(roots, return_inverse=True)[1][runs]


def _roots(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """For each of `count` parts the least number of a part that it hangs together with, by pairs that touch."""
    roots = np.arange(count)
    while (roots[one] != roots[other]).any():
        least = np.minimum(roots[one], roots[other])
        np.minimum.at(roots, roots[one], least)
        np.minimum.at(roots, roots[other], least)
        while (roots != roots[roots]).any():
            roots = roots[roots]
    return roots
