"""Rectified flow (arXiv:2403.03206 section 2): z_t = (1 - t) x0 + t eps, and the model predicts eps - x0."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from finetune.core.errors import BadInput
from finetune.objectives.base import Objective
from finetune.objectives.densities import Density, LogitNormal
from finetune.objectives.schedule import AnySchedule
from finetune.objectives.settings import ObjectiveSettings
from finetune.objectives.weightings.base import Unweighted


class RectifiedFlow(Objective):
    """The objective of rectified flows. Timesteps are float32 t * T, where 0 is the image and T is pure noise."""

    predictions = ("flow_prediction",)
    default_density: ClassVar[type[Density]] = LogitNormal

    def __init__(self, schedule: AnySchedule, settings: ObjectiveSettings | None = None, shift: float = 1.0) -> None:
        super().__init__(schedule, settings, shift)
        if not isinstance(self.settings.weighting, Unweighted):
            raise BadInput(
                f"objective.weighting is {self.settings.weighting.kind!r}, but this base is a flow, which has no loss "
                "weights: leave it out and choose objective.density"
            )

    def timesteps(self, uniform: Tensor, share: float = 1.0) -> Tensor:
        return self.positions(uniform) * share * self.schedule.steps

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        part = self._part(t, x0)
        return (1 - part) * x0 + part * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x0

    def clean(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        return noisy - self._part(t, noisy) * output

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float32)

    def _part(self, t: Tensor, like: Tensor) -> Tensor:
        return (t / self.schedule.steps).view(-1, *[1] * (like.ndim - 1)).to(like.dtype)
