"""How far the empty prompt has become the class: then it draws one thing, and guidance pushes every image from it."""

from __future__ import annotations

from typing import ClassVar

import torch

from finetune.verdicts.base import CLASS, EMPTY, Look, Measure, share_of_way


class EmptyClass(Measure):
    """The share of the way from the base's empty prompt to its prompt of the class that the empty prompt has gone."""

    name: ClassVar = "empty_class"
    title: ClassVar = "empty prompt became the class"
    meaning: ClassVar = "how far the empty prompt went on the way to the class: at 1 it draws only the class"
    reads: ClassVar = (EMPTY,)
    of_base: ClassVar = (CLASS,)

    def value(self, look: Look) -> float:
        now, base, wanted = (torch.stack(list(each)) for each in (look.now[EMPTY], look.base[EMPTY], look.base[CLASS]))
        return share_of_way(now - base, wanted - base, look.effect(CLASS, EMPTY))
