"""How far the empty prompt has moved, which classifier-free guidance pushes away from."""

from __future__ import annotations

from typing import ClassVar

from finetune.verdicts.base import ELSEWHERE, EMPTY, Look, Measure


class EmptyPrompt(Measure):
    name: ClassVar = "empty_prompt"
    title: ClassVar = "drift of the empty prompt"
    meaning: ClassVar = "how far the empty prompt is from the base's; guidance pushes every image away from it"
    reads: ClassVar = (EMPTY, ELSEWHERE)
    units: ClassVar = (ELSEWHERE,)

    def value(self, look: Look) -> float:
        return look.drift(EMPTY, ELSEWHERE)
