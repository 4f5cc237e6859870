"""How well other prompts are still understood, asked of the base's own drawings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from finetune.verdicts.base import DRAWN, DRAWN_PLAIN, LEAST_EFFECT, Look, Measure
from finetune.verdicts.points import loss


class Forgotten(Measure):
    """The share of other prompts' use that is lost.

    The use of a prompt is how much better an image that the base drew for it is predicted with it than without one:
    the evidence by which a diffusion model tells what an image shows (arXiv:2303.16203 eq. 4). A prior's images move
    what prompts do as far as a subject that leaks into them does, but they keep this.
    """

    name: ClassVar = "forgotten"
    title: ClassVar = "other prompts forgotten"
    meaning: ClassVar = "how much less other prompts help to predict the base's own images; below 0: they help more"
    reads: ClassVar = (DRAWN, DRAWN_PLAIN)

    def value(self, look: Look) -> float:
        before = _use(look, look.base)
        least = LEAST_EFFECT * loss(look.sets[DRAWN_PLAIN], look.base[DRAWN_PLAIN])
        return (before - _use(look, look.now)) / max(before, least, 1e-12)


def _use(look: Look, outputs: Mapping[str, Sequence[Tensor]]) -> float:
    """How much the squared error falls with the prompts: the mean of (a - b)(a + b - 2 target), where `a` is without
    and `b` with them. The two errors themselves are nearly alike, and their difference would be rounding."""
    plain, told = (torch.stack(list(outputs[name])).double() for name in (DRAWN_PLAIN, DRAWN))
    targets = torch.stack([point.target for point in look.sets[DRAWN] if point.target is not None])
    return float(((plain - told) * (plain + told - 2 * targets)).mean())
