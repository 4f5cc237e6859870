"""How far everything else has moved: prompts that have nothing to do with the subject."""

from __future__ import annotations

from typing import ClassVar

from finetune.verdicts.base import ELSEWHERE, ELSEWHERE_PLAIN, Look, Measure


class Elsewhere(Measure):
    name: ClassVar = "elsewhere"
    title: ClassVar = "drift elsewhere"
    meaning: ClassVar = "how much prompts about other things work differently than in the base"
    reads: ClassVar = (ELSEWHERE, ELSEWHERE_PLAIN)

    def value(self, look: Look) -> float:
        return look.drift(ELSEWHERE, ELSEWHERE_PLAIN)
