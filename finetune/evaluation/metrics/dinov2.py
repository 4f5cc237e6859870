"""DINOv2."""

from __future__ import annotations

from finetune.evaluation.base import Likeness


class DinoV2(Likeness):
    """Mean cosine of the class tokens of DINOv2, image by photo."""

    name = "dinov2"
    place = 2
    title = "DINOv2"
    backbone = "dinov2"
    default = False
    meaning = "likeness to the photos, by a later network than DINO's"
    blind = "its values can't be compared with DINO's; a copy of a photo scores best"
    source = "arXiv:2304.07193"
