"""Densities of timesteps: inverse distribution functions from [0, 1) to positions in [0, 1], where 1 is pure noise.

They are applied to uniform numbers, so stratified numbers stay stratified under every density.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finetune.core.settings import Settings, chosen_by_kind

if TYPE_CHECKING:
    from torch import Tensor


class Density(Settings):
    """The settings of a density, and its inverse distribution function."""

    kind: str

    @abstractmethod
    def position(self, u: Tensor) -> Tensor:
        """Uniform numbers [B] in [0, 1) -> positions [B] in [0, 1], before the shift."""


class Uniform(Density):
    kind: Literal["uniform"] = "uniform"

    def position(self, u: Tensor) -> Tensor:
        return u


class LogitNormal(Density):
    """t = sigmoid(m + s n) with n standard normal (arXiv:2403.03206 eq. 19). m > 0 moves timesteps towards noise."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)

    def position(self, u: Tensor) -> Tensor:
        import torch

        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class Mode(Density):
    """f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u) (arXiv:2403.03206 eq. 20); monotonic for -1 <= s <= 1.7519."""

    kind: Literal["mode"] = "mode"
    scale: float = Field(default=1.29, ge=-1, le=1.7519)

    def position(self, u: Tensor) -> Tensor:
        import torch

        return 1 - u - self.scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


class CosMap(Density):
    """t = 1 - 1 / (tan(pi u / 2) + 1) (arXiv:2403.03206 eq. 21)."""

    kind: Literal["cosmap"] = "cosmap"

    def position(self, u: Tensor) -> Tensor:
        import torch

        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


class Auto(Settings):
    """The base's own density: uniform for diffusion; for flows logit_normal with `mean` and `std` (None: 0 and 1)."""

    kind: Literal["auto"] = "auto"
    mean: float | None = None
    std: float | None = Field(default=None, gt=0)

    @property
    def given(self) -> dict[str, float]:
        """The settings that are set, for a density that has them."""
        return {name: value for name in ("mean", "std") if (value := getattr(self, name)) is not None}

    def of(self, default: type[Density]) -> Density:
        """The density `default` with those of the settings that it has."""
        return default(**{name: value for name, value in self.given.items() if name in default.model_fields})


DENSITIES = (Auto, Uniform, LogitNormal, Mode, CosMap)
AnyDensity: Any = chosen_by_kind(*DENSITIES)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Shifted positions t' = s t / (1 + (s - 1) t) in [0, 1], where s is `shift` (arXiv:2403.03206 eq. 23)."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)
