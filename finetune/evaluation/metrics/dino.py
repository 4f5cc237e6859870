"""DINO."""

from __future__ import annotations

from finetune.evaluation.base import Likeness


class Dino(Likeness):
    """Mean cosine of the class tokens of DINO ViT-S/16, image by photo."""

    name = "dino"
    place = 1
    title = "DINO"
    backbone = "dino"
    for_kinds = ("object", "live")
    default = True
    meaning = "likeness to the photos; DINO was trained without labels and keeps two dogs of one breed apart"
    blind = "place and light count a little; a copy of a photo scores best"
    source = "arXiv:2208.12242, section 4; arXiv:2104.14294"
