"""How far the empty prompt has become the subject. Classifier-free guidance pushes every image away from it."""

from __future__ import annotations

from typing import ClassVar

import torch

from finetune.verdicts.base import EMPTY, SUBJECT, Look, Measure, share_of_way


class EmptyPrompt(Measure):
    """The share of the way from the base's empty prompt to the subject that the empty prompt itself has gone."""

    name: ClassVar = "empty_prompt"
    title: ClassVar = "empty prompt became the subject"
    meaning: ClassVar = "how far the empty prompt went towards the subject; guidance pushes away from that prompt"
    reads: ClassVar = (SUBJECT, EMPTY)

    def value(self, look: Look) -> float:
        now, subject, base = (
            torch.stack(list(each)) for each in (look.now[EMPTY], look.now[SUBJECT], look.base[EMPTY])
        )
        return share_of_way(now - base, subject - base, look.effect(SUBJECT, EMPTY))
