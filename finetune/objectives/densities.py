"""Which timesteps are drawn: inverse distribution functions from [0, 1) to a position in [0, 1], 1 being pure noise.

Because each is applied to a uniform number, stratified numbers stay stratified under every density.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Density = Literal["uniform", "logit_normal", "mode", "cosmap"]


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """t = sigmoid(m + s n) with n standard normal (arXiv:2403.03206 eq. 19): m > 0 is towards noise."""
    import torch

    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(u: Tensor, scale: float) -> Tensor:
    """f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u) (arXiv:2403.03206 eq. 20); monotonic for -1 <= s <= 1.7519."""
    import torch

    return 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def cosmap(u: Tensor) -> Tensor:
    """t = 1 - 1 / (tan(pi u / 2) + 1) (arXiv:2403.03206 eq. 21)."""
    import torch

    return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


def shifted(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t) (arXiv:2403.03206 eq. 23)."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def position(u: Tensor, density: Density, mean: float, std: float, scale: float, shift: float) -> Tensor:
    """Uniform numbers [B] in [0, 1) -> positions [B] in [0, 1], float32."""
    if density == "uniform":
        t = u
    elif density == "logit_normal":
        t = logit_normal(u, mean, std)
    else:
        t = mode(u, scale) if density == "mode" else cosmap(u)
    return shifted(t, shift).clamp(0, 1)
