"""Finds copies and near-copies among many photos: perceptual hashes in a banded index, then a look at small images.

Two hashes that differ in few bits are equal in one of several bands of bits, so only photos that share a band are
compared: the work grows with the number of photos, not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

NEAR = 6  # of 64 dHash bits may differ between near-duplicates
SIDE = 16  # pixels: of the small images that decide
ALIKE = 12.0  # of 255: the mean difference of two small images that show the same
FAR = 55.0  # of 255: and the most that nearly all (98%) of their pixels differ. A drawing in another pose has more
CHUNK = 400_000  # pairs of hashes that are compared at once
IMAGES = 10_000  # pairs of small images that are compared at once


@dataclass(frozen=True)
class Look:
    """What a photo looks like: its 64-bit dHash, and 16x16 RGB pixels [16, 16, 3], uint8."""

    dhash: int
    small: np.ndarray


@dataclass(frozen=True)
class Pair:
    """Two photos, as numbers in the list that was given, that look the same. `bits` of their 64 dHash bits differ."""

    first: int
    second: int
    bits: int


def look_of(image: Image.Image) -> Look:
    """Returns what an RGB image looks like."""
    reduced = image.resize((SIDE * 8, SIDE * 8), Image.Resampling.BILINEAR, reducing_gap=2.0)
    small = np.asarray(reduced.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.uint8)
    return Look(difference_hash(image), small)


def difference_hash(image: Image.Image) -> int:
    """Returns the image's 64-bit dHash: shrunk to 9x8 grey pixels, whether each is darker than its right neighbour."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    bits = (grey[:, :-1] < grey[:, 1:]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def near_pairs(looks: Sequence[Look], near: int = NEAR, alike: float = ALIKE) -> list[Pair]:
    """Returns the pairs of photos that look the same: at most `near` bits differ, and their small images by at most
    `alike` of 255 in the mean and FAR anywhere, once both have the same brightness and contrast. Sorted by the second
    number, which is the larger one.
    """
    if len(looks) < 2:
        return []
    hashes = np.array([look.dhash for look in looks], dtype=np.uint64)
    smalls = np.stack([_levelled(look.small) for look in looks])
    found: list[Pair] = []
    coarse = _coarse(smalls)
    for first, second in _candidates(hashes, near):
        likely = np.abs(coarse[first] - coarse[second]).mean(1) <= alike
        first, second = first[likely], second[likely]
        same = _same(smalls, first, second, alike)
        bits = np.bitwise_count(hashes[first] ^ hashes[second])
        rows = zip(first[same].tolist(), second[same].tolist(), bits[same].tolist(), strict=True)
        found += [Pair(*row) for row in rows]
    return sorted(found, key=lambda pair: (pair.second, pair.bits, pair.first))


def _same(smalls: np.ndarray, first: np.ndarray, second: np.ndarray, alike: float) -> np.ndarray:
    """Whether the small images of each pair show the same. Piece by piece: there may be millions of pairs."""
    same = np.zeros(len(first), dtype=bool)
    for begin in range(0, len(first), IMAGES):
        part = slice(begin, begin + IMAGES)
        apart = np.abs(smalls[first[part]].astype(np.int16) - smalls[second[part]])
        near = np.flatnonzero(apart.mean((1, 2, 3)) <= alike)
        worst = np.percentile(apart[near].max(3).reshape(len(near), SIDE * SIDE), 98, axis=1)
        same[begin + near[worst <= FAR]] = True
    return same


def _coarse(smalls: np.ndarray) -> np.ndarray:
    """Means of 4x4 pixels, [photos, 48]: their mean difference is never larger than that of the pixels themselves."""
    means: np.ndarray = smalls.reshape(len(smalls), 4, 4, 4, 4, 3).mean((2, 4), dtype=np.float32)
    return means.reshape(len(smalls), -1)


def _levelled(small: np.ndarray) -> np.ndarray:
    """Brightness 128 and, where there is contrast, a standard deviation of 48: a brighter copy is the same photo."""
    values = small.astype(np.float32)
    centred = values - values.mean()
    spread = max(float(centred.std()), 8.0)
    levelled: np.ndarray = (centred * (48 / spread) + 128).clip(0, 255).astype(np.uint8)
    return levelled


def _candidates(hashes: np.ndarray, near: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Gives arrays of numbers of photos whose hashes differ in at most `near` bits. Each pair comes once, in the first
    band that it shares."""
    bands = near + 1
    edges = [round(64 * band / bands) for band in range(bands + 1)]
    earlier: list[np.uint64] = []
    for start, end in pairwise(edges):
        keys = (hashes >> np.uint64(start)) & np.uint64((1 << (end - start)) - 1)
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] + np.uint64(1)))
        for members in np.split(order, starts[1:]):
            yield from _within(np.sort(members), hashes, near, earlier)
        earlier.append(np.uint64(((1 << (end - start)) - 1) << start))


def _within(
    members: np.ndarray, hashes: np.ndarray, near: int, earlier: Sequence[np.uint64]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The near pairs among photos that share a band, without those that share one of the `earlier` bands (masks)."""
    own = hashes[members]
    rows = max(1, CHUNK // max(1, len(members)))
    for begin in range(0, len(members), rows):
        block = np.bitwise_count(own[begin : begin + rows, None] ^ own[None, begin:]) <= near
        first, second = np.nonzero(np.triu(block, 1))
        apart = own[begin + first] ^ own[begin + second]
        new = np.all([apart & mask != 0 for mask in earlier], axis=0) if earlier else np.ones(len(first), dtype=bool)
        if new.any():
            yield members[begin + first[new]], members[begin + second[new]]
