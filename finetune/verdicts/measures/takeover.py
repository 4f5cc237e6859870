"""How far the class has become the subject."""

from __future__ import annotations

from typing import ClassVar

import torch

from finetune.verdicts.base import CLASS, SUBJECT, Look, Measure

SHORTEST = 0.01  # in units of the prompts' effect


class Takeover(Measure):
    """The share of the way from the base's class to the subject that the class itself has gone:
    <class - base, subject - base> / |subject - base|^2, with all predictions at the same points.

    0: the class is where it was; 1: it draws the subject. Before the subject has moved by as much as a hundredth of
    the prompts' effect there is no way to be on, and it is 0.
    """

    name: ClassVar = "takeover"
    title: ClassVar = "class became the subject"
    meaning: ClassVar = "the share of the way from the class to the subject that the class itself went: 1 is all of it"
    reads: ClassVar = (CLASS, SUBJECT)
    units: ClassVar = (CLASS,)

    def value(self, look: Look) -> float:
        base, now, subject = (torch.stack(list(each)) for each in (look.base[CLASS], look.now[CLASS], look.now[SUBJECT]))
        way = subject - base
        length = float(way.square().mean())
        if length < SHORTEST**2 * look.effect(CLASS):
            return 0.0
        return float(((now - base) * way).mean()) / length
