"""Aspect-ratio buckets: pure arithmetic from a resolution to image sizes, and from a photo's size to one of them.

Photos of one bucket make batches of one shape, at about the same area as the square: less of a photo is cut away
(NovelAI's scheme, https://github.com/NovelAI/novelai-aspect-ratio-bucketing, with every size near that area).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Size = tuple[int, int]  # (width, height), pixels


def bucket_table(resolution: int, multiple: int, tolerance: float = 0.1) -> list[Size]:
    """Sizes (width, height) from the tallest to the widest; the square of side `resolution` is always one of them.

    Sides are multiples of `multiple` between half and twice `resolution`, and areas differ from the square's by at
    most its share `tolerance`. Of sizes with the same aspect ratio the one nearest to that area is taken: a larger
    tolerance gives more aspect ratios to choose from, and fewer photos in each.
    """
    square = (resolution, resolution)
    sides = [side for side in range(multiple, 2 * resolution + 1, multiple) if 2 * side >= resolution]
    most = Fraction(str(tolerance)) * resolution**2
    near = [(w, h) for w in sides for h in sides if abs(w * h - resolution**2) <= most]
    nearest_last = sorted(near, key=lambda size: (abs(size[0] * size[1] - resolution**2), size), reverse=True)
    return sorted({Fraction(*size): size for size in [*nearest_last, square]}.values(), key=lambda s: Fraction(*s))


def mismatch(size: Size, bucket: Size) -> Fraction:
    """exp |log (aspect / bucket's aspect)|, at least 1: exact, so that a tie is one on every machine."""
    one, other = size[0] * bucket[1], size[1] * bucket[0]
    return Fraction(max(one, other), min(one, other))


def nearest_bucket(size: Size, table: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of `size`, by its logarithm; of two the squarer, then the
    first in the table."""
    return min(table, key=lambda bucket: (mismatch(size, bucket), mismatch((1, 1), bucket)))


def cut_away(size: Size, bucket: Size) -> float:
    """The share of an image that does not fit into a bucket which it covers, in [0, 1)."""
    return float(1 - 1 / mismatch(size, bucket))
