"""How much of what was learned holds for the photos alone."""

from __future__ import annotations

from typing import ClassVar

from finetune.verdicts.base import HELD_OUT, PHOTOS, PHOTOS_PLAIN, Look, Measure
from finetune.verdicts.measures.learned import better


class Overfit(Measure):
    name: ClassVar = "overfit"
    title: ClassVar = "overfit"
    meaning: ClassVar = "the gap between the photos and the unseen views: what was learned by heart"
    reads: ClassVar = (PHOTOS, HELD_OUT)
    of_base: ClassVar = (PHOTOS_PLAIN,)

    def value(self, look: Look) -> float:
        return better(look, PHOTOS) - better(look, HELD_OUT)
