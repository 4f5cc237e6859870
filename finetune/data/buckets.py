"""Aspect-ratio buckets: computes the image sizes for a resolution, and chooses one of them for each photo.

The photos of a bucket have one size, so they fit into one batch. Every bucket has about the area of the square, and
less of a photo is cut away than by a square crop. The scheme is NovelAI's
(https://github.com/NovelAI/novelai-aspect-ratio-bucketing), but with all sizes near that area.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

Size = tuple[int, int]  # (width, height), pixels


@lru_cache(maxsize=4096)
def shared_pair(x: int, y: int) -> tuple[int, int]:
    """The same tuple for the same numbers: 100,000 photos have few different sizes, and each tuple takes 56 bytes."""
    return x, y


def bucket_table(resolution: int, multiple: int, tolerance: float = 0.1) -> list[Size]:
    """Returns the bucket sizes (width, height) in pixels, from the tallest to the widest.

    Sides are multiples of `multiple` between half and twice `resolution`. Areas differ from that of the square with
    side `resolution` by at most the share `tolerance`. The square is always included. Of several sizes with the same
    aspect ratio, only the one nearest to the square's area is used. A larger tolerance gives more aspect ratios, so
    fewer photos share a bucket.
    """
    square = (resolution, resolution)
    sides = [side for side in range(multiple, 2 * resolution + 1, multiple) if 2 * side >= resolution]
    most = Fraction(str(tolerance)) * resolution**2
    near = [(w, h) for w in sides for h in sides if abs(w * h - resolution**2) <= most]
    nearest_last = sorted(near, key=lambda size: (abs(size[0] * size[1] - resolution**2), size), reverse=True)
    return sorted({Fraction(*size): size for size in [*nearest_last, square]}.values(), key=lambda s: Fraction(*s))


def mismatch(size: Size, bucket: Size) -> Fraction:
    """Returns how much two aspect ratios differ: exp |log (aspect / bucket's aspect)|, at least 1.

    The result is an exact fraction, so that ties are equal on every machine.
    """
    one, other = size[0] * bucket[1], size[1] * bucket[0]
    return Fraction(max(one, other), min(one, other))


def nearest_bucket(size: Size, table: Sequence[Size]) -> Size:
    """Returns the bucket of `table` with the aspect ratio nearest to that of `size` (both in pixels).

    Aspect ratios are compared by their logarithms. At a tie the bucket nearer to a square wins, then the first one.
    """
    return min(table, key=lambda bucket: (mismatch(size, bucket), mismatch((1, 1), bucket)))


def cut_away(size: Size, bucket: Size) -> float:
    """Returns the share of an image, in [0, 1), that is cut away when it is resized to cover a bucket and cropped."""
    return float(1 - 1 / mismatch(size, bucket))
