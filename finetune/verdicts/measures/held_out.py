"""How much was learned, on views of the subject that training never sees."""

from __future__ import annotations

from typing import ClassVar

from finetune.verdicts.base import HELD_OUT, PHOTOS, PHOTOS_PLAIN, Look, Measure
from finetune.verdicts.measures.learned import better


class HeldOut(Measure):
    name: ClassVar = "held_out"
    title: ClassVar = "learned, on unseen views"
    meaning: ClassVar = "the same, on closer crops or on held-out photos, which training never sees"
    reads: ClassVar = (HELD_OUT, PHOTOS)
    of_base: ClassVar = (PHOTOS_PLAIN,)

    def value(self, look: Look) -> float:
        return better(look, HELD_OUT)
