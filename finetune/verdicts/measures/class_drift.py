"""How far the class has moved: prompts with the noun and without the token."""

from __future__ import annotations

from typing import ClassVar

from finetune.verdicts.base import CLASS, Look, Measure


class ClassDrift(Measure):
    name: ClassVar = "class_drift"
    title: ClassVar = "class drift"
    meaning: ClassVar = "how far prompts of the class, without the token, are from the base's"
    reads: ClassVar = (CLASS,)
    units: ClassVar = (CLASS,)

    def value(self, look: Look) -> float:
        return look.drift(CLASS, CLASS)
