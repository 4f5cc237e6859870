"""The arithmetic of the metrics: cosines, distances of sets, and intervals. All in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float64]

RESAMPLES = 2000
SHARE = 0.95
FEWEST = 5  # values: the interval of two holds the true mean half of the time, that of five in .84 (of normal values)


def cosines(ones: Vectors, others: Vectors) -> Vectors:
    """[n, d] and [m, d] -> the cosine of each pair [n, m]. A vector of zeros has a cosine of 0 with everything."""
    return _unit(ones) @ _unit(others).T


def _unit(vectors: Vectors) -> Vectors:
    lengths: Vectors = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)


def squared_distances(ones: Vectors, others: Vectors) -> Vectors:
    """[n, d] and [m, d] -> the squared Euclidean distance of each pair [n, m]."""
    return np.stack([((others - one) ** 2).sum(axis=1) for one in ones])


def among(matrix: Vectors) -> float | None:
    """The mean of a symmetric [n, n] over pairs of different rows; None for fewer than two."""
    count = len(matrix)
    return None if count < 2 else float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of the mean (Efron 1979); None for fewer than `FEWEST` values.

    The resamples are the same each time, so that the same images give the same interval.
    """
    if len(values) < FEWEST:
        return None
    means = np.asarray(values)[draws(len(values))].mean(axis=1)
    return bounds(means)


def draws(count: int) -> NDArray[np.int64]:
    """[RESAMPLES, count]: which of `count` values each resample holds."""
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def bounds(values: Vectors) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = np.quantile(values, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def cubic_kernel(ones: Vectors, others: Vectors) -> Vectors:
    """The kernel of KID, (x·y / d + 1)^3: [n, d] and [m, d] -> [n, m]."""
    kernel: Vectors = (ones @ others.T / ones.shape[1] + 1) ** 3
    return kernel


def kernel_distances(within: Vectors, across: Vectors, among_others: float, weights: Vectors) -> Vectors:
    """The unbiased estimate of the squared maximum mean discrepancy (arXiv:1801.01401, equation 4), once for each row
    of weights.

    Args:
        within: kernel of the images with each other [n, n]; across: with the others [n, m].
        among_others: mean kernel of different ones of the others.
        weights: how often each image counts [k, n]. An image is never compared with itself, also where it counts
            twice.

    Returns:
        [k]
    """
    itself = weights**2
    pairs = weights.sum(axis=1) ** 2 - itself.sum(axis=1)
    own = ((weights @ within) * weights).sum(axis=1) - itself @ np.diag(within)
    distances: Vectors = own / pairs + among_others - 2 * (weights @ across.mean(axis=1)) / weights.sum(axis=1)
    return distances


def frechet(ones: Vectors, others: Vectors) -> float:
    """The Fréchet distance of two Gaussians with the means and covariances of [n, d] and [m, d]
    (arXiv:1706.08500, equation 6): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With X and Y the centred sets, C1 = X'X / (n - 1), and the trace of (C1 C2)^(1/2) is the sum of the singular values
    of X Y' / sqrt((n - 1) (m - 1)). This needs no root of a [d, d] matrix, and is exact for few images too.
    """
    first, second = ones - ones.mean(axis=0), others - others.mean(axis=0)
    scale = float(np.sqrt((len(ones) - 1) * (len(others) - 1)))
    mixed = np.linalg.svd(_thin(first) @ _thin(second).T, compute_uv=False).sum() / scale
    spread = (first**2).sum() / (len(ones) - 1) + (second**2).sum() / (len(others) - 1)
    return float(((ones.mean(axis=0) - others.mean(axis=0)) ** 2).sum() + spread - 2 * mixed)


def _thin(centred: Vectors) -> Vectors:
    """[n, d] -> at most [d, d] with the same X'X, so that thousands of images need no larger matrix."""
    if len(centred) <= centred.shape[1]:
        return centred
    upper: Vectors = np.linalg.qr(centred, mode="r")  # type: ignore[assignment]
    return upper
