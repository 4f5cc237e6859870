"""Loss functions, and the mean of their values for each sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finetune.core.settings import Settings, chosen_by_kind

if TYPE_CHECKING:
    from torch import Tensor

NO_MASK = 1e-8  # below the sum of the smallest possible mask: one grey level of 255 in one pixel of one latent


class L2(Settings):
    """The squared error e^2 of each element."""

    kind: Literal["l2"] = "l2"

    def of(self, difference: Tensor) -> Tensor:
        return difference.square()


class Huber(Settings):
    """Pseudo-Huber loss 2 c (sqrt(e^2 + c^2) - c) of each element (arXiv:2403.16728): close to linear for |e| > c."""

    kind: Literal["huber"] = "huber"
    c: float = Field(default=0.1, gt=0)

    def of(self, difference: Tensor) -> Tensor:
        return 2 * self.c * ((difference.square() + self.c**2).sqrt() - self.c)


LOSSES = (L2, Huber)
Loss: Any = chosen_by_kind(*LOSSES)


def per_sample(error: Tensor, mask: Tensor | None = None) -> Tensor:
    """Errors [B, C, h, w] -> their means [B]. With a mask [B, 1, h, w] in [0, 1], the means are weighted by it.

    They are sum(mask * error) / (C * sum(mask)), so the size of the masked area does not change the loss. A mask of
    zeros results in 0.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    weights = mask.expand_as(error).flatten(1)
    return (weights * error.flatten(1)).sum(1) / weights.sum(1).clamp(min=NO_MASK)
