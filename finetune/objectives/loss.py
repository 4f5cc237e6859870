"""From an error at every latent pixel to one number a sample."""

from __future__ import annotations

from torch import Tensor

NO_MASK = 1e-8  # less than the faintest mask sums to: one pixel of 255 grey levels in one of 4096 latents


def per_sample(error: Tensor, mask: Tensor | None = None) -> Tensor:
    """Errors [B, C, h, w] -> their means [B]; with a mask [B, 1, h, w], the means over what it shows.

    sum(mask * error) / (C * sum(mask)): how large the masked part is does not change its loss. 0 for a mask of zeros.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    weights = mask.expand_as(error).flatten(1)
    return (weights * error.flatten(1)).sum(1) / weights.sum(1).clamp(min=NO_MASK)
