"""How far everything else has moved: prompts that have nothing to do with the subject."""

from __future__ import annotations

from typing import ClassVar

from finetune.verdicts.base import ELSEWHERE, Look, Measure


class Elsewhere(Measure):
    name: ClassVar = "elsewhere"
    title: ClassVar = "drift elsewhere"
    meaning: ClassVar = "how far prompts about other things are from the base's"
    reads: ClassVar = (ELSEWHERE,)
    units: ClassVar = (ELSEWHERE,)

    def value(self, look: Look) -> float:
        return look.drift(ELSEWHERE, ELSEWHERE)
