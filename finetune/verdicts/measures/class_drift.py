"""How far the class has moved: prompts with the noun and without the token."""

from __future__ import annotations

from typing import ClassVar

from finetune.verdicts.base import CLASS, EMPTY, Look, Measure


class ClassDrift(Measure):
    name: ClassVar = "class_drift"
    title: ClassVar = "class drift"
    meaning: ClassVar = "how much prompts of the class, without the token, work differently than in the base"
    reads: ClassVar = (CLASS, EMPTY)

    def value(self, look: Look) -> float:
        return look.drift(CLASS, EMPTY)
