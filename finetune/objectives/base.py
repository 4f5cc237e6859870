"""The objective seam: noising, target and loss weight. Tensors only, no model. A new one is one new file here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from finetune.core.rng import SampleKey, normal
from finetune.objectives.densities import Auto, Density, shifted
from finetune.objectives.schedule import AnySchedule, Prediction
from finetune.objectives.settings import ObjectiveSettings


class Objective(ABC):
    """How a base was trained: latents are noised to a timestep, and its output is compared with a target.

    Tensors are [B, ...]; `t` [B] are timesteps as the model takes them.
    """

    predictions: ClassVar[tuple[str, ...]]
    default_density: ClassVar[type[Density]]

    def __init__(self, schedule: AnySchedule, settings: ObjectiveSettings | None = None, shift: float = 1.0) -> None:
        self.schedule, self.settings, self.shift = schedule, settings or ObjectiveSettings(), shift
        self.prediction: Prediction = schedule.prediction

    def to(self, device: torch.device | str) -> Objective:
        return self

    @property
    def density(self) -> Density:
        wanted = self.settings.density
        return wanted.of(self.default_density) if isinstance(wanted, Auto) else wanted

    def describe(self) -> str:
        """Which timesteps are drawn, for the plan."""
        return (
            f"{self.density.kind}{', stratified' * (self.settings.timesteps == 'stratified')}, shift {self.shift:.3g}"
        )

    def positions(self, uniform: Tensor) -> Tensor:
        """Uniform numbers [B] in [0, 1) -> where on the way to pure noise (1) each sample lies, by the density."""
        return shifted(self.density.position(uniform), self.shift).clamp(0, 1)

    def noises(self, draws: Sequence[SampleKey], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The noise [B, C, h, w] that the target knows, and the noise that is added: the same unless perturbed."""
        own = self.settings
        noise = normal(draws, shape, "noise")
        if own.noise_offset:
            noise = noise + own.noise_offset * normal(draws, (shape[0], 1, 1), "noise offset")
        if not own.input_perturbation:
            return noise, noise
        return noise, noise + own.input_perturbation * normal(draws, shape, "input perturbation")

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """What `objective.loss` makes of prediction - target, by element."""
        error: Tensor = self.settings.loss.of(prediction - target)
        return error

    @abstractmethod
    def timesteps(self, uniform: Tensor) -> Tensor:
        """Uniform numbers [B] in [0, 1) -> timesteps [B] (the inverse distribution function)."""

    @abstractmethod
    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...

    @abstractmethod
    def clean(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The x0 that a model output at `noisy` stands for: the inverse of `target`."""

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """Loss weight [B] of each sample, float32."""
