"""DIV: do images of one prompt differ?"""

from __future__ import annotations

from finetune.evaluation.base import PromptMetric, Seen
from finetune.evaluation.statistics import Vectors, among, squared_distances


class Div(PromptMetric):
    """Mean LPIPS between images of the same prompt at different seeds."""

    name = "div"
    place = 9
    title = "DIV (LPIPS)"
    backbone = "lpips"
    higher_is_better = True
    least = 2
    meaning = "diversity: how different the images of one prompt look"
    blind = "noise and broken images are diverse too; read it beside the likeness"
    source = "arXiv:2208.12242, section 4.2; arXiv:1801.03924"

    def of_prompt(self, images: Vectors, seen: Seen, number: int) -> float:
        value = among(squared_distances(images, images))
        assert value is not None
        return value

    def reference(self, photos: Vectors) -> float | None:
        return among(squared_distances(photos, photos)) if len(photos) > 1 else None
