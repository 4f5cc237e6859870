"""How much of the photos was learned."""

from __future__ import annotations

from typing import ClassVar

from finetune.verdicts.base import PHOTOS, PHOTOS_PLAIN, Look, Measure
from finetune.verdicts.points import loss


def better(look: Look, name: str) -> float:
    """How much the loss at a set of photos fell, in units of the effect of the photos' captions on the base."""
    fell = loss(look.sets[name], look.base[name]) - loss(look.sets[name], look.now[name])
    return fell / look.effect(PHOTOS, PHOTOS_PLAIN)


class Learned(Measure):
    name: ClassVar = "learned"
    title: ClassVar = "learned, on the photos"
    meaning: ClassVar = "how much better the model predicts the photos than the base does, at fixed noise"
    reads: ClassVar = (PHOTOS,)
    of_base: ClassVar = (PHOTOS_PLAIN,)

    def value(self, look: Look) -> float:
        return better(look, PHOTOS)
