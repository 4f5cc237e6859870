"""From an error at every latent pixel to one number a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finetune.core.settings import Settings, chosen_by_kind

if TYPE_CHECKING:
    from torch import Tensor

NO_MASK = 1e-8  # less than the faintest mask sums to: one pixel of 255 grey levels in one of 4096 latents


class L2(Settings):
    """e^2, by element."""

    kind: Literal["l2"] = "l2"

    def of(self, difference: Tensor) -> Tensor:
        return difference.square()


class Huber(Settings):
    """Pseudo-Huber 2 c (sqrt(e^2 + c^2) - c) (arXiv:2403.16728), by element: linear above `c`."""

    kind: Literal["huber"] = "huber"
    c: float = Field(default=0.1, gt=0)

    def of(self, difference: Tensor) -> Tensor:
        return 2 * self.c * ((difference.square() + self.c**2).sqrt() - self.c)


LOSSES = (L2, Huber)
Loss: Any = chosen_by_kind(*LOSSES)


def per_sample(error: Tensor, mask: Tensor | None = None) -> Tensor:
    """Errors [B, C, h, w] -> their means [B]; with a mask [B, 1, h, w], the means over what it shows.

    sum(mask * error) / (C * sum(mask)): how large the masked part is does not change its loss. 0 for a mask of zeros.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    weights = mask.expand_as(error).flatten(1)
    return (weights * error.flatten(1)).sum(1) / weights.sum(1).clamp(min=NO_MASK)
