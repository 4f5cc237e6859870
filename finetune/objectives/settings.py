"""The `objective:` section of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from finetune.core.settings import Settings
from finetune.objectives.densities import AnyDensity, Auto
from finetune.objectives.loss import L2, Loss
from finetune.objectives.older import new_form
from finetune.objectives.weightings.base import Unweighted
from finetune.objectives.weightings.registry import LossWeight


class ObjectiveSettings(Settings):
    """The `objective:` section of a recipe. `auto` means the base's own value.

    `prediction`: what the base was trained to predict; another value is refused. `timesteps: stratified` spreads each
    global batch evenly over the timesteps, which lowers the variance of the loss without changing its mean.
    `density`, `weighting` (by timestep) and `loss` are a kind with its own settings (`{kind: min_snr, gamma: 5}`), or
    only a kind's name. `shift` moves timesteps towards noise for large images. `noise_offset` adds a random constant
    to each channel of the noise. `input_perturbation` (arXiv:2301.11706) adds noise that is not part of the target.

    The older form of these settings is also accepted (`finetune.objectives.older`).
    """

    prediction: Literal["auto", "epsilon", "v_prediction", "sample", "flow_prediction"] = "auto"
    timesteps: Literal["uniform", "stratified"] = "uniform"
    density: AnyDensity = Auto()
    shift: Literal["auto"] | float = "auto"
    weighting: LossWeight = Unweighted()
    loss: Loss = L2()
    noise_offset: float = Field(default=0.0, ge=0, le=1)
    input_perturbation: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _older_form(cls, value: Any) -> Any:
        return new_form(value) if isinstance(value, dict) else value
