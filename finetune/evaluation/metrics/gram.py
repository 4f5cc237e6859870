"""Gram: how far are the textures from the drawings'?"""

from __future__ import annotations

import numpy as np

from finetune.evaluation.base import PromptMetric, Seen
from finetune.evaluation.statistics import Vectors, among, squared_distances


class Gram(PromptMetric):
    """Gatys' style loss: the squared distance of Gram matrices of five layers of VGG-19, image by drawing."""

    name = "gram"
    place = 6
    title = "Gram distance"
    backbone = "vgg"
    higher_is_better = False
    for_kinds = ("style",)
    meaning = "distance of colours and textures to the drawings, without regard to where they are in the picture"
    blind = "it sees no composition and no line as a whole; strong contrasts dominate it"
    source = "arXiv:1508.06576, equations 3 to 5"

    def of_prompt(self, images: Vectors, seen: Seen, number: int) -> float:
        return float(np.mean(squared_distances(images, seen.photos)))

    def reference(self, photos: Vectors) -> float | None:
        return among(squared_distances(photos, photos))
