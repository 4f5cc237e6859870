"""The only training loop. One batch can be read straight through, from latents to the stepped optimiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def update_ema(ema: dict[str, Tensor], trained: dict[str, nn.Parameter], decay: float | None, step: int) -> None:
    """ema += (1 - d) (weights - ema), with d = min(decay, (1 + n)/(10 + n)) so that a short run is not its start."""
    if not ema or decay is None:
        return
    decay = min(decay, (1 + step) / (10 + step))
    averages = [ema[name] for name in trained]
    torch._foreach_lerp_(averages, [parameter.detach() for parameter in trained.values()], 1 - decay)
