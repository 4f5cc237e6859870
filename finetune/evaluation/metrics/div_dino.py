"""DIV by DINO: do images of one prompt differ? It needs no further network."""

from __future__ import annotations

from finetune.evaluation.base import PromptMetric, Seen
from finetune.evaluation.statistics import Vectors, among, cosines


class DivDino(PromptMetric):
    """1 minus the mean cosine of DINO's class tokens, between images of the same prompt at different seeds."""

    name = "div_dino"
    place = 10
    title = "DIV (DINO)"
    backbone = "dino"
    higher_is_better = True
    default = True
    least = 2
    meaning = "diversity: how different the images of one prompt are for DINO; the paper's DIV is LPIPS"
    blind = "noise and broken images are diverse too; read it beside the likeness"
    source = "own; the idea is DIV of arXiv:2208.12242, section 4.2"

    def of_prompt(self, images: Vectors, seen: Seen, number: int) -> float:
        value = among(cosines(images, images))
        assert value is not None
        return 1 - value

    def reference(self, photos: Vectors) -> float | None:
        value = among(cosines(photos, photos))
        return None if value is None else 1 - value
