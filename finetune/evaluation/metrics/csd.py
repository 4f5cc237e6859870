"""CSD."""

from __future__ import annotations

from finetune.evaluation.base import Likeness


class Csd(Likeness):
    """Mean cosine of contrastive style descriptors, image by drawing."""

    name = "csd"
    place = 5
    title = "CSD"
    backbone = "csd"
    default = False
    meaning = "likeness of the style to the drawings, whatever they show"
    blind = "it knows styles of known artists better than new ones; contents leak in a little"
    source = "arXiv:2404.01292"
    for_kinds = ("style",)
