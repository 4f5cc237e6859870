"""The interface of training objectives: timesteps, noise, target and loss weight. It works on tensors, without a
model.

To add an objective, add one file to this folder.
"""

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
    """The training objective of a base: it adds noise to latents for a timestep, and defines the model's target.

    `x0`, `noise` and `noisy` are latents [B, C, h, w]. `t` [B] are timesteps in the model's own scale. `shift` is the
    resolution shift of timesteps (arXiv:2403.03206 eq. 23).
    """

    predictions: ClassVar[tuple[str, ...]]
    default_density: ClassVar[type[Density]]

    def __init__(self, schedule: AnySchedule, settings: ObjectiveSettings | None = None, shift: float = 1.0) -> None:
        self.schedule, self.settings, self.shift = schedule, settings or ObjectiveSettings(), shift
        self.prediction: Prediction = schedule.prediction

    def to(self, device: torch.device | str) -> Objective:
        """The objective with its tables on `device`."""
        return self

    @property
    def density(self) -> Density:
        """The density of timesteps: the recipe's, or this objective's default for `auto`."""
        wanted = self.settings.density
        return wanted.of(self.default_density) if isinstance(wanted, Auto) else wanted

    def describe(self) -> str:
        """A description of how timesteps are drawn, for the plan."""
        spread = ", spread evenly in each step" * (self.settings.timesteps == "stratified")
        shift = f", shift {self.shift:.3g} (above 1: more noise)" if self.shift != 1 else ""
        return f"{self.density.kind} over the noise levels{spread}{shift}"

    def positions(self, uniform: Tensor) -> Tensor:
        """Uniform numbers [B] in [0, 1) -> noise positions [B] from 0 (image) to 1 (pure noise), by the density and
        the shift."""
        return shifted(self.density.position(uniform), self.shift).clamp(0, 1)

    def noises(self, draws: Sequence[SampleKey], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draws noise [B, C, h, w] for samples of `shape` [C, h, w]. Returns the noise for the target and the noise
        that is added to the latents; they differ only with `input_perturbation` (arXiv:2301.11706)."""
        own = self.settings
        noise = normal(draws, shape, "noise")
        if own.noise_offset:
            noise = noise + own.noise_offset * normal(draws, (shape[0], 1, 1), "noise offset")
        if not own.input_perturbation:
            return noise, noise
        return noise, noise + own.input_perturbation * normal(draws, shape, "input perturbation")

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The recipe's loss of prediction - target, for each element: [B, C, h, w]."""
        error: Tensor = self.settings.loss.of(prediction - target)
        return error

    @abstractmethod
    def timesteps(self, uniform: Tensor, share: float = 1.0) -> Tensor:
        """Uniform numbers [B] in [0, 1) -> timesteps [B], by the inverse distribution function. `share`: of the noise
        levels, from the lowest on, over which the density is spread (`Family.timestep_fraction`)."""

    @abstractmethod
    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy latents [B, C, h, w] at timesteps `t`."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The output [B, C, h, w] that the model is trained to return."""

    @abstractmethod
    def clean(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The x0 [B, C, h, w] that corresponds to a model output for `noisy`: the inverse of `target`."""

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """The loss weight of each sample: [B], float32."""
