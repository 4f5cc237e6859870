"""Looks for lettering in one photo: a watermark, a date, a caption that was printed over it. No network is used.

A line of letters is a row of small marks of one height, with one line below them, strokes of one width and one
contrast, and little else close above and below. The words are not read, nor whether they belong to the subject.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_tools.alike import place_of
from finetune.data.blobs import Box, connected

SIDES = (1024, 384)  # pixels: the longer side of the copies that are looked at, for small and for large letters
LOW, HIGH = 7, 48  # pixels: the height of a letter
STROKE = 13  # pixels: what is wider is no stroke
NEAR = 9  # pixels: a stroke's own edge is compared with its middle
FAINT = 12  # of 255: the least contrast of a stroke
MOST = 1_500  # marks: a photo with more shows grass or leaves, and the clearest are taken
FEWEST = 5  # letters of a line
LEVEL = 0.14  # of a letter's height: how far a letter's foot may lie from the line; g, p and commas reach below
LONG = 3.0  # heights: the length of a line
# Spreads relative to the mean, and a share, that speak wholly against a line
WIDTHS, CONTRASTS, CLUTTER = 0.5, 0.6, 0.5
ENOUGH = 2.0  # evidence: a photo's most line-like row has 1.6, of the six subjects that set it (docs/data.md)


@dataclass(frozen=True)
class Marks:
    """Small connected marks: their boxes in pixels, contrast (of 255) and stroke width in pixels, one value each."""

    left: np.ndarray
    top: np.ndarray
    right: np.ndarray
    bottom: np.ndarray
    contrast: np.ndarray
    stroke: np.ndarray

    @property
    def height(self) -> np.ndarray:
        """In pixels."""
        return np.asarray(self.bottom - self.top)

    def of(self, chosen: np.ndarray) -> Marks:
        """The chosen marks."""
        return Marks(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Line:
    """A line of lettering: how many letters were made out, and where, as shares of the photo's sides."""

    letters: int
    box: Box


def told_of_lines(image: Image.Image) -> tuple[list[str], list[str]]:
    """Problems and notes about the lettering on an RGB image. In the middle it may well be the subject's: a note."""
    lines = find_lines(image)
    if not lines:
        return [], []
    left, top, right, bottom = lines[0].box
    place = place_of((top + bottom) / 2, (left + right) / 2)
    if place == "middle":
        return [], ["lettering in the middle: a watermark there would be learned; the subject's own is fine"]
    return [f"lettering at the {place}, such as a watermark or a date: crop it away, or mask it"], []


def find_lines(image: Image.Image) -> list[Line]:
    """The lines of lettering in an RGB image, the longest first."""
    found = []
    for side in SIDES:
        scale = min(1.0, side / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        if min(size) < 2 * STROKE:
            continue
        small = image.resize(size, Image.Resampling.BOX, reducing_gap=2.0).convert("L")
        found += lines_of(np.asarray(small))
    return sorted(found, key=lambda line: -line.letters)


def lines_of(grey: np.ndarray) -> list[Line]:
    """The lines in a grey image [height, width], uint8, whose letters are LOW to HIGH pixels high."""
    shape = (grey.shape[1], grey.shape[0])
    hats = top_hats(grey)
    either = np.maximum(*hats)
    found = []
    for hat in hats:
        for row in rows_of(marks_of(stroke_mask(hat), hat)):
            if evidence(row, either) >= ENOUGH:
                found.append(Line(len(row.left), _shares(row, shape)))
    return found


def top_hats(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much brighter, and how much darker, each pixel is than what is around strokes, int16 [height, width]."""
    opened = _spread(_spread(grey, np.minimum), np.maximum)
    closed = _spread(_spread(grey, np.maximum), np.minimum)
    values = grey.astype(np.int16)
    return values - opened, closed - values


def _spread(values: np.ndarray, of: np.ufunc, window: int = STROKE) -> np.ndarray:
    """The least or largest value of the square window around each pixel."""
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (window // 2, window - 1 - window // 2)
        padded, reach = np.pad(values, pad, mode="edge"), 1
        length = values.shape[axis]
        while reach < window:
            step = min(reach, window - reach)
            padded = of(_part(padded, axis, 0, -step), _part(padded, axis, step, None))
            reach += step
        values = _part(padded, axis, 0, length)
    return values


def _part(values: np.ndarray, axis: int, start: int, end: int | None) -> np.ndarray:
    return values[start:end] if axis == 0 else values[:, start:end]


def stroke_mask(hat: np.ndarray) -> np.ndarray:
    """Which pixels are of strokes: above half of the largest contrast near them."""
    return np.asarray((hat > FAINT) & (2 * hat > _spread(hat, np.maximum, NEAR)))


def marks_of(mask: np.ndarray, hat: np.ndarray) -> Marks:
    """The connected parts that have a letter's size and shape."""
    labels = connected(mask)
    rows, columns = np.nonzero(labels)
    own = labels[rows, columns]
    count = int(labels.max()) + 1
    area = np.bincount(own, minlength=count)
    ends = [_ends(own, place, count) for place in (columns, rows)]
    (left, right), (top, bottom) = ends
    inner = mask & _surrounded(mask)
    outline = area - np.bincount(labels[inner], minlength=count)
    contrast = np.bincount(own, weights=hat[rows, columns], minlength=count) / np.maximum(area, 1)
    marks = Marks(left, top, right, bottom, contrast, 2 * area / np.maximum(outline, 1))
    width, height = right - left, bottom - top
    fill = area / np.maximum(width * height, 1)
    shaped = (height >= LOW) & (height <= HIGH) & (width <= 1.6 * height) & (fill > 0.12)
    shaped[0] = False
    marks = marks.of(np.flatnonzero(shaped))
    return marks if len(marks.left) <= MOST else marks.of(np.argsort(-marks.contrast)[:MOST])


def _ends(own: np.ndarray, place: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    first, last = np.full(count, np.iinfo(np.int64).max), np.full(count, -1)
    np.minimum.at(first, own, place)
    np.maximum.at(last, own, place)
    first[last < 0] = 0
    return first, last + 1


def _surrounded(mask: np.ndarray) -> np.ndarray:
    """Which pixels have neighbours of the mask on all four sides."""
    padded = np.pad(mask, 1)
    return np.asarray(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])


def rows_of(marks: Marks) -> list[Marks]:
    """Marks that stand side by side: of like height and contrast, near to each other."""
    if len(marks.left) < FEWEST:
        return []
    marks = marks.of(np.argsort(marks.left, kind="stable"))
    height = marks.height
    larger, smaller = np.maximum(height[:, None], height[None]), np.minimum(height[:, None], height[None])
    gap = marks.left[None] - marks.right[:, None]
    overlap = np.minimum(marks.bottom[:, None], marks.bottom[None]) - np.maximum(marks.top[:, None], marks.top[None])
    fits = (
        (gap <= 1.1 * larger) & (gap >= -0.15 * larger)
        & (overlap >= 0.6 * smaller) & (larger <= 2.0 * smaller)
        & (np.abs(np.log(marks.contrast[:, None] / marks.contrast[None])) <= 0.6)
    )  # fmt: skip
    fits &= marks.left[None] > marks.left[:, None]
    gap = np.where(fits, gap, 10**6)
    following = gap.argmin(1)
    chosen = fits[np.arange(len(gap)), following] & (gap.argmin(0)[following] == np.arange(len(gap)))
    follows = dict(zip(np.flatnonzero(chosen).tolist(), following[chosen].tolist(), strict=True))
    return [marks.of(np.array(row)) for row in _chains(follows) if len(row) >= FEWEST]


def _chains(follows: dict[int, int]) -> list[list[int]]:
    """The rows, each from its first mark on."""
    chains = []
    for first in sorted(follows.keys() - set(follows.values())):
        row = [first]
        while row[-1] in follows:
            row.append(follows[row[-1]])
        chains.append(row)
    return chains


def evidence(row: Marks, contrast: np.ndarray) -> float:
    """How much speaks for lettering: the number of marks, less for each thing that is not as in print.

    These are feet beside the line, strokes of unlike width or contrast, and other strokes close above and below.
    """
    height = float(np.median(row.height))
    if float(row.right.max() - row.left.min()) < LONG * height:
        return 0.0
    middle = (row.left + row.right) / 2
    slope, start = _fitted(middle, row.bottom)
    on_line = float((np.abs(row.bottom - slope * middle - start) <= max(1.0, LEVEL * height)).mean())
    against = (
        _spread_of(row.stroke) / WIDTHS, _spread_of(row.contrast) / CONTRASTS, clutter(contrast, row) / CLUTTER,
    )  # fmt: skip
    return len(row.left) * on_line * float(np.prod([max(0.0, 1 - each) for each in against]))


def _spread_of(values: np.ndarray) -> float:
    return float(values.std() / values.mean())


def _fitted(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The line through most points: the median of slopes (Theil-Sen)."""
    apart = x[:, None] - x[None]
    slopes = (y[:, None] - y[None])[apart > 0] / apart[apart > 0]
    slope = float(np.median(slopes)) if len(slopes) else 0.0
    return slope, float(np.median(y - slope * x))


def clutter(contrast: np.ndarray, row: Marks) -> float:
    """The share of the room close above and below a row that has strokes of half of its contrast."""
    height = int(np.ceil(float(np.median(row.height)) * 0.5))
    left, right, top, bottom = int(row.left.min()), int(row.right.max()), int(row.top.min()), int(row.bottom.max())
    above, below = slice(max(0, top - height), max(0, top - 1)), slice(bottom + 1, bottom + height)
    rooms = (contrast[above, left:right], contrast[below, left:right])
    count = sum(room.size for room in rooms)
    limit = float(np.median(row.contrast)) / 2
    return sum(float((room > limit).sum()) for room in rooms) / max(count, 1)


def _shares(row: Marks, size: tuple[int, int]) -> Box:
    width, height = size
    box = (row.left.min() / width, row.top.min() / height, row.right.max() / width, row.bottom.max() / height)
    return (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
