"""FID: the distance of two large sets of images."""

from __future__ import annotations

import numpy as np

from finetune.evaluation.base import Metric, Score, Seen
from finetune.evaluation.statistics import frechet

FEW = 2048  # with fewer images than features, the covariance has no full rank


class Fid(Metric):
    """The Fréchet distance of InceptionV3's features, images against photos."""

    name = "fid"
    place = 13
    title = "FID"
    backbone = "inception"
    higher_is_better = False
    meaning = "distance of all images to all photos as sets"
    blind = "it is biased upwards for small sets: compare only equal numbers of images, and prefer KID"
    source = "arXiv:1706.08500; resizing: arXiv:2104.11222"

    def score(self, seen: Seen) -> Score:
        chosen = [seen.images[k] for k in seen.of(self.group)]
        count = sum(map(len, chosen))
        if count < 2 or len(seen.photos) < 2:
            return Score(None, note="it needs two images and two photos at least")
        fewer = min(count, len(seen.photos))
        few = f"biased upwards ({fewer} images; {FEW} would be needed); " if fewer < FEW else ""
        return Score(
            frechet(np.concatenate(chosen), seen.photos), note=f"{few}no interval, since resampling biases it"
        )
