"""Where the subject of a photo is likely to be, from its colours alone: no weights, nothing to download.

The method is that of Zhu et al. 2014, "Saliency Optimization from Robust Background Detection" (CVPR): regions that
are joined to the photo's border along much of it are background, regions that differ from background are subject, and
both are brought together by least squares. The regions are SLIC's (Achanta et al. 2012). Added here: what is far from
the middle counts less, and the highest contrast is a quantile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from finetune.data.blobs import Box, border_share, box_of, main_part, otsu

SIDE, QUICK = 128, 96  # pixels: the longer side of what is looked at, and for a hint
REGIONS = 240  # of an image of 128 x 128 pixels
APART, MOST_EDGE, MOST_AREA = 3.0, 0.05, 0.5  # a hint's subject: sigmas from the background, share of border and photo
ROUNDS = 5  # of SLIC
COMPACT = 12.0  # SLIC's m: Lab units that count as much as one region's width
JOINED = 10.0  # Lab units: sigma of the distance within which regions are one area (section 3.2)
NEAR = 0.35  # share of the sides: sigma of the distance within which contrast counts
ALIKE = 10.0  # Lab units: sigma of the least squares' smoothness
MIDDLE = 0.4  # share of the sides: sigma of how far from the middle subjects are
TOP = 0.97  # quantile: an eye's contrast says nothing of the head
LEAST = 0.1  # its weight between regions of quite different colours

# linear sRGB to CIE XYZ, divided by the white point D65
XYZ = np.array([[0.4339, 0.3763, 0.1899], [0.2127, 0.7152, 0.0722], [0.0178, 0.1095, 0.8728]], dtype=np.float32)


@dataclass(frozen=True)
class Regions:
    """An image as regions: `labels` [height, width] gives each pixel's number, `colours` [n, 3] are their Lab means,
    `places` [n, 2] their centres (y, x) as shares of the longer side, `middle` [n] how central they are (0 to 1)."""

    labels: np.ndarray
    colours: np.ndarray
    places: np.ndarray
    middle: np.ndarray


def saliency(image: Image.Image, side: int = SIDE) -> np.ndarray:
    """Returns how likely each pixel belongs to the subject, [height, width] float32 in [0, 1].

    `image` is RGB. The result's longer side has `side` pixels, or the image's if that is smaller.
    """
    found = regions_of(lab_of(shrunk(image, side)))
    return np.asarray(salient(found)[found.labels].astype(np.float32))


def salient_box(image: Image.Image) -> Box | None:
    """The box around the subject of a small RGB image, or None if its saliency does not tell subject from background.

    It is quick and made for hints: the longer side is looked at with 96 pixels.
    """
    values = saliency(image, QUICK)
    inside = main_part(values > otsu(values), values)
    if not 0 < inside.mean() < MOST_AREA or border_share(inside) > MOST_EDGE:
        return None
    one, other = values[inside], values[~inside]
    apart = float((one.mean() - other.mean()) / np.sqrt(one.var() + other.var() + 1e-6))
    return box_of(inside) if apart > APART else None


def regions_of(lab: np.ndarray) -> Regions:
    """The regions of an image in Lab [height, width, 3]."""
    labels = regions(lab)
    count, (height, width) = int(labels.max()) + 1, labels.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    places = means(np.stack([y, x], axis=-1), labels, count)
    off = (places + 0.5) / (height, width) - 0.5
    middle = np.exp(-(off**2).sum(1) / (2 * MIDDLE**2))
    return Regions(labels, means(lab, labels, count), places / max(height, width), middle)


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The image with a longer side of at most `side` pixels."""
    scale = min(1.0, side / max(image.size))
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0)


def lab_of(image: Image.Image) -> np.ndarray:
    """CIE L*a*b* of an sRGB image, [height, width, 3] float32."""
    values = np.asarray(image, dtype=np.float32) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    xyz = linear @ XYZ.T
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


def regions(lab: np.ndarray) -> np.ndarray:
    """Splits an image into regions of like colour; returns the number of each pixel's, [height, width].

    SLIC, without its last step: a region may have a few stray pixels.
    """
    height, width = lab.shape[:2]
    step = max(1.0, SIDE / REGIONS**0.5)
    rows, columns = max(1, round(height / step)), max(1, round(width / step))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    row, column = (y * rows / height).astype(int), (x * columns / width).astype(int)
    weight = COMPACT / step
    features = np.concatenate([lab, (weight * y)[..., None], (weight * x)[..., None]], axis=-1)
    planes = [np.ascontiguousarray(plane) for plane in np.moveaxis(features, -1, 0)]
    around = _around((row, column), (rows, columns))
    labels = row * columns + column
    for _ in range(ROUNDS):
        labels = _nearest(planes, means(features, labels, rows * columns), around)
    _, compact = np.unique(labels, return_inverse=True)
    return compact.reshape(height, width)


def _around(at: tuple[np.ndarray, np.ndarray], grid: tuple[int, int]) -> list[np.ndarray]:
    """The numbers of the nine regions that start around each pixel, nine times [height, width]."""
    (row, column), (rows, columns) = at, grid
    return [
        np.clip(row + down, 0, rows - 1) * columns + np.clip(column + right, 0, columns - 1)
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    ]


def _nearest(planes: list[np.ndarray], centres: np.ndarray, around: list[np.ndarray]) -> np.ndarray:
    """Each pixel's nearest centre among the nine that started around it.

    Plane by plane: numpy's sums over five values of a pixel take five times as long.
    """
    best, labels = np.full(around[0].shape, np.inf, dtype=np.float32), np.zeros(around[0].shape, dtype=int)
    for number in around:
        apart = np.zeros_like(best)
        for plane, centre in zip(planes, centres.T, strict=True):
            apart += (plane - np.ascontiguousarray(centre)[number]) ** 2
        nearer = apart < best
        np.copyto(best, apart, where=nearer)
        np.copyto(labels, number, where=nearer)
    return labels


def means(values: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The mean of `values` [height, width, n] in each of `count` regions, [count, n]."""
    flat = labels.ravel()
    sizes = np.maximum(np.bincount(flat, minlength=count), 1)
    sums = [np.bincount(flat, weights=values[..., each].ravel(), minlength=count) for each in range(values.shape[-1])]
    return (np.stack(sums, axis=-1) / sizes[:, None]).astype(np.float32)


def salient(found: Regions) -> np.ndarray:
    """The saliency of each region, [n] in [0, 1]."""
    labels, count = found.labels, len(found.colours)
    apart = np.sqrt(_squares(found.colours))
    touching = _touching(labels, count)
    ground = _background(apart, touching, _on_border(labels, count))
    near = np.exp(-_squares(found.places) / (2 * NEAR**2))
    contrast = (apart * near * ground).sum(1) * found.middle
    contrast = np.minimum(contrast / max(float(np.quantile(contrast, TOP)), 1e-6), 1)
    return _least_squares(contrast, ground, apart, touching)


def _squares(points: np.ndarray) -> np.ndarray:
    """The squared distances of points [n, dimensions], [n, n]."""
    total = np.zeros((len(points), len(points)), dtype=points.dtype)
    for values in points.T:
        total += (values[:, None] - values[None]) ** 2
    return total


def _touching(labels: np.ndarray, count: int) -> np.ndarray:
    """Which regions share an edge, [count, count] bool."""
    touching = np.zeros((count, count), dtype=bool)
    touching[labels[:, :-1], labels[:, 1:]] = True
    touching[labels[:-1], labels[1:]] = True
    return (touching | touching.T) & ~np.eye(count, dtype=bool)


def _on_border(labels: np.ndarray, count: int) -> np.ndarray:
    edges = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.bincount(edges, minlength=count) > 0


def _background(apart: np.ndarray, touching: np.ndarray, border: np.ndarray) -> np.ndarray:
    """How likely each region is background: the border's part in the area that it is joined to (section 3)."""
    joined = touching | (border[:, None] & border[None])
    distance = np.where(joined, apart, np.inf)
    usual = np.quantile(np.where(touching, apart, np.inf).min(1), 0.8)  # noise within a surface counts nothing
    distance = np.maximum(distance - usual, 0)
    np.fill_diagonal(distance, 0)
    for middle in range(len(distance)):  # Floyd and Warshall's shortest ways
        np.minimum(distance, distance[:, middle, None] + distance[None, middle], out=distance)
    share = np.exp(-(distance**2) / (2 * JOINED**2))
    connected = share[:, border].sum(1) / np.sqrt(share.sum(1))
    return np.asarray(1 - np.exp(-(connected**2) / 2))


def _least_squares(contrast: np.ndarray, ground: np.ndarray, apart: np.ndarray, touching: np.ndarray) -> np.ndarray:
    """Saliency near 1 where there is contrast, near 0 in the background, and like that of like neighbours (4.2)."""
    weights = np.where(touching, np.exp(-(apart**2) / (2 * ALIKE**2)) + LEAST, 0)
    matrix = np.diag(weights.sum(1) + ground + contrast) - weights
    found = np.linalg.solve(matrix, contrast)
    low, high = float(found.min()), float(found.max())
    return (found - low) / max(high - low, 1e-6)
