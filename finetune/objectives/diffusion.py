"""Variance-preserving diffusion; the model predicts epsilon, v or x0.

Notation of arXiv:2006.11239: z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from finetune.objectives.base import Objective
from finetune.objectives.densities import Density, Uniform
from finetune.objectives.schedule import DIFFUSION, AnySchedule, Schedule
from finetune.objectives.settings import ObjectiveSettings


class Diffusion(Objective):
    """The objective of diffusion bases. Timesteps are int64 in 0 .. T-1."""

    predictions = DIFFUSION
    default_density: ClassVar[type[Density]] = Uniform

    def __init__(self, schedule: AnySchedule, settings: ObjectiveSettings | None = None, shift: float = 1.0) -> None:
        super().__init__(schedule, settings, shift)
        assert isinstance(schedule, Schedule)
        self.alphas_cumprod = schedule.alphas_cumprod

    def to(self, device: torch.device | str) -> Diffusion:
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        return self

    def timesteps(self, uniform: Tensor, share: float = 1.0) -> Tensor:
        steps = self.schedule.steps
        last = math.ceil(share * steps) - 1
        return (self.positions(uniform) * share * steps).long().clamp(max=last)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps (arXiv:2006.11239 eq. 4)."""
        signal, sigma = self._coefficients(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """eps, x0, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) z0 (arXiv:2202.00512 appendix D)."""
        if self.prediction != "v_prediction":
            return noise if self.prediction == "epsilon" else x0
        signal, sigma = self._coefficients(t, x0)
        return signal * noise - sigma * x0

    def clean(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "sample":
            return output
        signal, sigma = self._coefficients(t, noisy)
        if self.prediction == "epsilon":
            return (noisy - sigma * output) / signal
        return signal * noisy - sigma * output

    def weight(self, t: Tensor) -> Tensor:
        weight: Tensor = self.settings.weighting.weight(self.snr(t), self.prediction)
        return weight

    def snr(self, t: Tensor) -> Tensor:
        abar = self.alphas_cumprod[t]
        return abar / (1 - abar)

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod[t].view(-1, *[1] * (like.ndim - 1)).to(like.dtype)
        return abar.sqrt(), (1 - abar).sqrt()
