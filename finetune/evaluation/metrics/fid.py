"""FID: the distance of two large sets of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune.evaluation.base import Score, SetMetric
from finetune.evaluation.statistics import Vectors, frechet

FEW = 2048  # with fewer images than features, the covariance has no full rank


class Fid(SetMetric):
    """The Fréchet distance of InceptionV3's features, images against photos."""

    name = "fid"
    place = 13
    title = "FID"
    backbone = "inception"
    meaning = "distance of all images to all photos as sets"
    blind = "it is biased upwards for small sets: compare only equal numbers of images, and prefer KID"
    source = "arXiv:1706.08500; resizing: arXiv:2104.11222"

    def of_sets(self, parts: Sequence[Vectors], photos: Vectors) -> Score:
        images = np.concatenate(parts)
        fewer = min(len(images), len(photos))
        few = f"biased upwards ({fewer} images; {FEW} would be needed); " if fewer < FEW else ""
        return Score(frechet(images, photos), note=f"{few}no interval, since resampling biases it")
