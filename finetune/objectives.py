"""Noise schedules, prediction targets and loss weights: tensors only, no model.

Notation of arXiv:2006.11239: abar_t = prod(1 - beta_i), z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps, and
SNR_t = abar_t / (1 - abar_t).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.errors import BadInput
from finetune.settings import Settings

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Schedule:
    """A base's noise schedule: `alphas_cumprod` [T] float32 and what the base was trained to predict."""

    alphas_cumprod: Tensor
    prediction: Prediction

    @staticmethod
    def from_config(config: dict[str, Any]) -> Schedule:
        """Reads a diffusers scheduler_config.json; never assumes a value that the config states."""
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise BadInput(
                f"the base predicts {prediction!r}; epsilon and v_prediction are supported: choose another base"
            )
        return Schedule(_alphas_cumprod(config), prediction)


def _alphas_cumprod(config: dict[str, Any]) -> Tensor:
    """abar_t [T], float32, with the arithmetic that diffusers' schedulers use (float32 throughout)."""
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32)
    else:
        raise BadInput(f"the base's beta_schedule is {kind!r}; scaled_linear and linear are supported")
    if config.get("rescale_betas_zero_snr"):
        betas = _zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0)


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """arXiv:2305.08891 algorithm 1: shift sqrt(abar) so that its last is 0 and scale so that its first stays."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root**2
    return 1.0 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


class Objective(Settings):
    """The `objective:` section of a recipe.

    `prediction: auto` is what the base was trained with. `weighting: min_snr` caps the SNR at `gamma`
    (arXiv:2303.09556). `timesteps: stratified` spreads one global batch evenly over the timesteps, which
    lowers the variance of the loss and leaves its mean as it is.
    """

    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    weighting: Literal["none", "min_snr"] = "none"
    gamma: float = 5.0
    timesteps: Literal["uniform", "stratified"] = "uniform"

    def build(self, schedule: Schedule) -> Diffusion:
        if self.prediction not in ("auto", schedule.prediction):
            raise BadInput(
                f"objective.prediction is {self.prediction!r} but the base was trained with "
                f"{schedule.prediction!r}: leave it at auto"
            )
        return Diffusion(schedule, self.gamma if self.weighting == "min_snr" else None)


class Diffusion:
    """A variance-preserving diffusion objective (epsilon or v). Tensors of shape [B, ...]; timesteps [B] int64."""

    def __init__(self, schedule: Schedule, min_snr_gamma: float | None = None) -> None:
        self.schedule = schedule
        self.prediction = schedule.prediction
        self.gamma = min_snr_gamma
        self.alphas_cumprod = schedule.alphas_cumprod

    def to(self, device: torch.device | str) -> Diffusion:
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        return self

    def timesteps(self, uniform: Tensor) -> Tensor:
        """Uniform numbers [B] in [0, 1) -> timesteps [B] int64 in 0 .. T-1 (the inverse distribution function)."""
        steps = len(self.alphas_cumprod)
        return (uniform * steps).long().clamp(max=steps - 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps (arXiv:2006.11239 eq. 4)."""
        signal, sigma = self._coefficients(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """eps, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) z0 (arXiv:2202.00512 appendix D)."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._coefficients(t, x0)
        return signal * noise - sigma * x0

    def weight(self, t: Tensor) -> Tensor:
        """Loss weight [B]: 1, or min-SNR (arXiv:2303.09556): min(SNR, g)/SNR for eps, min(SNR, g)/(SNR + 1) for v."""
        if self.gamma is None:
            return torch.ones_like(t, dtype=torch.float32)
        snr = self.snr(t)
        capped = snr.clamp(max=self.gamma)
        return capped / snr if self.prediction == "epsilon" else capped / (snr + 1)

    def snr(self, t: Tensor) -> Tensor:
        abar = self.alphas_cumprod[t]
        return abar / (1 - abar)

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod[t].view(-1, *[1] * (like.ndim - 1)).to(like.dtype)
        return abar.sqrt(), (1 - abar).sqrt()
