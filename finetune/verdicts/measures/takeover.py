"""How far the class has become the subject."""

from __future__ import annotations

from typing import ClassVar

import torch

from finetune.verdicts.base import CLASS, EMPTY, SUBJECT, Look, Measure, share_of_way


class Takeover(Measure):
    """The share of the way from the base's class to the subject that the class itself has gone, in what prompts do.

    0: the class is where it was; 1: it draws the subject. A way that is shorter than the class prompt's own effect is
    none: before the subject is learned, both move alike.
    """

    name: ClassVar = "takeover"
    title: ClassVar = "class became the subject"
    meaning: ClassVar = "how far the class went on the way to the subject: at 1 its prompt draws the subject"
    reads: ClassVar = (CLASS, SUBJECT, EMPTY)

    def value(self, look: Look) -> float:
        gone = look.change(CLASS, EMPTY)
        apart = torch.stack(list(look.now[SUBJECT])) - torch.stack(list(look.now[CLASS]))
        return share_of_way(gone, gone + apart, look.effect(CLASS, EMPTY))
