"""DIV: do images of one prompt differ?"""

from __future__ import annotations

from finetune.evaluation.base import Diversity
from finetune.evaluation.statistics import Vectors, among, squared_distances


class Div(Diversity):
    """Mean LPIPS between images of the same prompt at different seeds."""

    name = "div"
    place = 9
    title = "DIV (LPIPS)"
    backbone = "lpips"
    meaning = "diversity: how different the images of one prompt look"
    blind = "noise and broken images are diverse too; read it beside the likeness"
    source = "arXiv:2208.12242, section 4.2; arXiv:1801.03924"

    def between(self, images: Vectors) -> float | None:
        return among(squared_distances(images, images))
