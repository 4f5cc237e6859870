"""DINOv3."""

from __future__ import annotations

from finetune.evaluation.base import Likeness


class DinoV3(Likeness):
    """Mean cosine of the class tokens of DINOv3, image by photo."""

    name = "dinov3"
    place = 3
    title = "DINOv3"
    backbone = "dinov3"
    default = False
    meaning = "likeness to the photos, by a later network than DINO's"
    blind = "its values can't be compared with DINO's; a copy of a photo scores best"
    source = "arXiv:2508.10104"
