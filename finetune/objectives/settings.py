"""The `objective:` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune.core.settings import Settings
from finetune.objectives.densities import Density
from finetune.objectives.weights import Weighting


class ObjectiveSettings(Settings):
    """The `objective:` section of a recipe. What is `auto` or null is the base's own, or the paper's.

    `prediction`: what the base was trained to predict; anything else is refused. `timesteps: stratified` spreads one
    global batch evenly over the timesteps, which lowers the variance of the loss and leaves its mean as it is.
    `density`: uniform for diffusion, logit_normal for flows. `shift` moves timesteps towards noise for large pictures.
    `weighting`: by timestep, `gamma` being min-SNR's cap or P2's exponent. `loss: huber` grows linearly above
    `huber_c`. `noise_offset` adds a constant per channel to the noise, `input_perturbation` (arXiv:2301.11706) noise
    that the target knows nothing of.
    """

    prediction: Literal["auto", "epsilon", "v_prediction", "sample", "flow_prediction"] = "auto"
    timesteps: Literal["uniform", "stratified"] = "uniform"
    density: Literal["auto"] | Density = "auto"
    logit_mean: float = 0.0
    logit_std: float = Field(default=1.0, gt=0)
    mode_scale: float = Field(default=1.29, ge=-1, le=1.7519)
    shift: Literal["auto"] | float = "auto"
    weighting: Weighting = "none"
    gamma: float | None = Field(default=None, gt=0)
    loss: Literal["l2", "huber"] = "l2"
    huber_c: float = Field(default=0.1, gt=0)
    noise_offset: float = Field(default=0.0, ge=0, le=1)
    input_perturbation: float = Field(default=0.0, ge=0, le=1)
