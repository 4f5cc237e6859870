"""KID: the distance of two sets of images, also for small sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune.evaluation.base import Score, SetMetric
from finetune.evaluation.statistics import FEWEST, Vectors, among, bounds, cubic_kernel, draws, kernel_distances


class Kid(SetMetric):
    """The unbiased squared maximum mean discrepancy of InceptionV3's features, images against photos."""

    name = "kid"
    place = 12
    title = "KID"
    backbone = "inception"
    meaning = "distance of all images to all photos as sets; it is unbiased, so that it can fall below 0"
    blind = "with a few photos of one subject it mostly compares scenes; use it for styles and large sets"
    source = "arXiv:1801.01401; resizing: arXiv:2104.11222"

    def of_sets(self, parts: Sequence[Vectors], photos: Vectors) -> Score:
        images = np.concatenate(parts)
        others = among(cubic_kernel(photos, photos))
        assert others is not None  # there are two photos
        kernels = (cubic_kernel(images, images), cubic_kernel(images, photos), others)
        value = float(kernel_distances(*kernels, np.ones((1, len(images))))[0])
        low, high = self._interval(kernels, list(map(len, parts))) or (None, None)
        return Score(value, low, high)

    def _interval(self, kernels: tuple[Vectors, Vectors, float], sizes: list[int]) -> tuple[float, float] | None:
        """Over prompts, whose images count as often as the resample holds the prompt; None for fewer than `FEWEST`."""
        count = len(sizes)
        if count < FEWEST:
            return None
        counts = np.stack([np.bincount(drawn, minlength=count) for drawn in draws(count)])
        weights = np.repeat(counts, sizes, axis=1).astype(np.float64)
        different = (weights > 0).sum(axis=1) > 1  # one image alone has no other to be compared with
        return bounds(kernel_distances(*kernels, weights[different]))
