"""A mask of a photo's subject from its colours alone: no weights, nothing to download.

As GrabCut does (Rother et al. 2004), two mixtures of Gaussians learn the colours of subject and background in turn
with the mask. Its graph cut is replaced by a random walker with priors (Grady 2005, "Multilabel Random Walkers Using
Prior Models", CVPR): a sparse linear system, whose solution has soft edges. The start is the saliency of
`finetune.data.saliency`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from finetune.data.blobs import border_share, main_blobs, otsu
from finetune.data.saliency import lab_of, saliency, shrunk

SIDE = 224  # pixels: the longer side of what is segmented
SAMPLED = 72  # pixels: the longer side of what the mixtures learn from
COLOURS = 5  # Gaussians of subject and of background each, as in GrabCut
TURNS = 3
STEPS = 5  # of expectation and maximisation in each turn
NOISE = 4.0  # Lab units: no Gaussian is narrower
SOFT = 0.08  # of saliency: how gradual the first mask is
EDGE = 6.0  # Lab units: sigma of the difference across which neighbours are joined
JOIN = 1e-3  # how much they are joined across any edge
OWN = 0.02  # how much a pixel's own colour counts against its neighbours
SURE = 4.0  # log odds: a colour says no more than this
PLACE = 3.0  # log odds that saliency adds where it is twice the first mask's limit
MOST_SOFT, MOST_EDGE = 0.9, 0.1  # a mask beyond these is not relied on
LEAST, MOST_AREA = 0.005, 0.8  # nor is one that is nothing or nearly all
SOLVED, MOST = 1e-8, 150  # conjugate gradients: squared residual of a pixel, and steps


@dataclass(frozen=True)
class Mixture:
    """Gaussians in Lab: `weights` [k], `centres` [k, 3] and `covariances` [k, 3, 3]."""

    weights: np.ndarray
    centres: np.ndarray
    covariances: np.ndarray

    def log_parts(self, colours: np.ndarray) -> np.ndarray:
        """The log of each Gaussian's weighted density at `colours` [n, 3], less a constant: [n, k]."""
        parts = []
        for weight, centre, covariance in zip(self.weights, self.centres, self.covariances, strict=True):
            root = np.linalg.cholesky(covariance)
            whitened = (colours - centre) @ np.linalg.inv(root).T
            parts.append(np.log(weight) - np.log(np.diag(root)).sum() - 0.5 * (whitened**2).sum(1))
        return np.stack(parts, axis=-1)

    def log_density(self, colours: np.ndarray) -> np.ndarray:
        """The log density at `colours` [n, 3], less a constant: [n]."""
        return np.asarray(np.logaddexp.reduce(self.log_parts(colours), axis=-1))


@dataclass(frozen=True)
class Segmented:
    """The `mask` of a photo's subject and the `saliency` that it began with, both [height, width] float32 in [0, 1].

    `soft` are the pixels of which it is not sure, as a share of the subject's; `edge` is the subject's share of the
    photo's border.
    """

    mask: np.ndarray
    saliency: np.ndarray
    soft: float
    edge: float

    @property
    def clear(self) -> bool:
        """Whether the mask can be relied on (docs/data.md says how the limits were found)."""
        return self.soft <= MOST_SOFT and self.edge <= MOST_EDGE and LEAST <= float(self.mask.mean()) <= MOST_AREA


def segment(image: Image.Image) -> Segmented:
    """Returns the mask of an RGB image's subject, without holes.

    The longer side has 224 pixels, or the image's if that is smaller.
    """
    small = shrunk(image, SIDE)
    lab, sampled = lab_of(small), lab_of(shrunk(small, SAMPLED))
    start = resized(saliency(image), small.size)
    limit = otsu(start)
    place = PLACE * (start - limit) / max(limit, 0.2)
    mask = _squashed((start - limit) / SOFT)
    front = back = None
    for _ in range(TURNS):
        share = resized(mask, (sampled.shape[1], sampled.shape[0]), Image.Resampling.BOX).ravel().clip(0, 1)
        front = learn(sampled.reshape(-1, 3), share**2, front)
        back = learn(sampled.reshape(-1, 3), (1 - share) ** 2, back)
        odds = front.log_density(lab.reshape(-1, 3)) - back.log_density(lab.reshape(-1, 3))
        prior = _squashed(odds.reshape(start.shape).clip(-SURE, SURE) + place)
        mask = walk(lab, prior)
    sure = mask > 0.5
    soft = float(((mask > 0.1) & (mask < 0.9)).sum() / max(int(sure.sum()), 1))
    found = main_blobs(mask, start)
    return Segmented(found, start, soft, border_share(found > 0.5))


def resized(values: np.ndarray, size: tuple[int, int], resample: int = Image.Resampling.BILINEAR) -> np.ndarray:
    """Values [height, width] at another `size` (width, height), float32."""
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling(resample)))


def _squashed(odds: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-odds.clip(-30, 30))), dtype=np.float32)


def learn(colours: np.ndarray, weights: np.ndarray, mixture: Mixture | None) -> Mixture:
    """Fits a mixture to `colours` [n, 3] with `weights` [n], from where the last one was."""
    mixture = mixture or _first(colours, weights)
    for _ in range(STEPS):
        logs = mixture.log_parts(colours)
        parts = np.exp(logs - np.logaddexp.reduce(logs, axis=-1)[:, None]) * weights[:, None]
        mixture = _of_parts(colours, parts)
    return mixture


def _of_parts(colours: np.ndarray, parts: np.ndarray) -> Mixture:
    """The Gaussians of `parts` [n, k]: how much of each colour belongs to each."""
    sizes = parts.sum(0) + 1e-6
    centres = parts.T @ colours / sizes[:, None]
    floor = NOISE**2 * np.eye(3)
    covariances = []
    for part, size, centre in zip(parts.T, sizes, centres, strict=True):
        apart = colours - centre
        covariances.append((apart * part[:, None]).T @ apart / size + floor)
    return Mixture(sizes / sizes.sum(), centres, np.stack(covariances))


def _first(colours: np.ndarray, weights: np.ndarray) -> Mixture:
    """Splits the widest part across its widest direction until there are enough (Orchard and Bouman 1991)."""
    parts = [weights]
    while len(parts) < COLOURS:
        spreads = [_spread(colours, part) for part in parts]
        widest = max(range(len(parts)), key=lambda number: spreads[number][0])
        _, direction, centre = spreads[widest]
        side = (colours - centre) @ direction > 0
        part = parts.pop(widest)
        parts += [part * side, part * ~side]
    return _of_parts(colours, np.stack(parts, axis=-1))


def _spread(colours: np.ndarray, part: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The largest scatter of a part, its direction [3] and the part's centre [3]."""
    centre = part @ colours / (part.sum() + 1e-6)
    apart = colours - centre
    values, vectors = np.linalg.eigh((apart * part[:, None]).T @ apart)
    return float(values[-1]), vectors[:, -1], centre


def walk(lab: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Smooths `prior` [height, width] within surfaces and not across the edges of `lab` [height, width, 3].

    Solves (L + OWN) x = OWN prior, where L is the Laplacian of the grid of pixels, by conjugate gradients with
    Jacobi's preconditioner.
    """
    right, down = _joined(lab[:, 1:] - lab[:, :-1]), _joined(lab[1:] - lab[:-1])
    diagonal = np.full(prior.shape, OWN, dtype=np.float32)
    for part, joined in _sides(diagonal, right, down):
        part += joined
    found = prior.copy()
    rest = OWN * prior - _applied(found, right, down)
    step = ready = rest / diagonal
    energy = float((rest * ready).sum())
    for _ in range(MOST):
        if energy < SOLVED * prior.size:
            break
        moved = _applied(step, right, down)
        length = energy / float((step * moved).sum())
        found = found + length * step
        rest = rest - length * moved
        ready = rest / diagonal
        before, energy = energy, float((rest * ready).sum())
        step = ready + energy / before * step
    return found.clip(0, 1)


def _joined(apart: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(-(apart**2).sum(-1) / (2 * EDGE**2)) + JOIN)


def _sides(values: np.ndarray, right: np.ndarray, down: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The four views of `values` that have a neighbour on one side, each with how it is joined to it."""
    return [(values[:, :-1], right), (values[:, 1:], right), (values[:-1], down), (values[1:], down)]


def _applied(values: np.ndarray, right: np.ndarray, down: np.ndarray) -> np.ndarray:
    """(L + OWN) applied to `values`."""
    result = OWN * values
    across, along = right * (values[:, 1:] - values[:, :-1]), down * (values[1:] - values[:-1])
    result[:, 1:] += across
    result[:, :-1] -= across
    result[1:] += along
    result[:-1] -= along
    return np.asarray(result)
