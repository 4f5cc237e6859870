"""DIV by DINO: do images of one prompt differ? It needs no further network."""

from __future__ import annotations

from finetune.evaluation.base import Diversity
from finetune.evaluation.statistics import Vectors, among, cosines


class DivDino(Diversity):
    """1 minus the mean cosine of DINO's class tokens, between images of the same prompt at different seeds."""

    name = "div_dino"
    place = 10
    title = "DIV (DINO)"
    backbone = "dino"
    default = True
    meaning = "diversity: how different the images of one prompt are for DINO; the paper's DIV is LPIPS"
    blind = "noise and broken images are diverse too; read it beside the likeness"
    source = "own; the idea is DIV of arXiv:2208.12242, section 4.2"

    def between(self, images: Vectors) -> float | None:
        likeness = among(cosines(images, images))
        return None if likeness is None else 1 - likeness
