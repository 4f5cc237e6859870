"""Reads a base's noise schedule, and what it was trained to predict, from its scheduler_config.json.

Notation of arXiv:2006.11239: abar_t = prod(1 - beta_i) and SNR_t = abar_t / (1 - abar_t).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.core.errors import BadInput

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
DIFFUSION: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Schedule:
    """A variance-preserving schedule: `alphas_cumprod` [T] float32."""

    alphas_cumprod: Tensor
    prediction: Prediction

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    @staticmethod
    def from_config(config: dict[str, Any]) -> Schedule:
        """Reads the config of a diffusers scheduler that adds noise by betas."""
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in DIFFUSION:
            raise BadInput(
                f"the base predicts {prediction!r}; only {', '.join(DIFFUSION)} are supported: choose another base"
            )
        return Schedule(_alphas_cumprod(config), prediction)


@dataclass(frozen=True)
class FlowSchedule:
    """A rectified flow (arXiv:2403.03206): z_t = (1 - t) x0 + t eps for t in [0, 1]. The model reads t * `steps`.

    `shift` is the base's own at its native resolution. `dynamic` (Flux) replaces it: (n0, n1, mu0, mu1) define the
    line from (n0, mu0) to (n1, mu1) that maps an image's number of tokens to log(shift).
    """

    steps: int = 1000
    shift: float = 1.0
    dynamic: tuple[int, int, float, float] | None = None
    prediction: Prediction = "flow_prediction"

    @staticmethod
    def from_config(config: dict[str, Any]) -> FlowSchedule:
        dynamic = None
        if config.get("use_dynamic_shifting"):
            dynamic = (
                int(config.get("base_image_seq_len", 256)),
                int(config.get("max_image_seq_len", 4096)),
                float(config.get("base_shift", 0.5)),
                float(config.get("max_shift", 1.15)),
            )
        return FlowSchedule(int(config.get("num_train_timesteps", 1000)), float(config.get("shift", 1.0)), dynamic)

    def shift_for(self, side: int, native: int, tokens: int) -> float:
        """The resolution shift s of t' = s t / (1 + (s - 1) t) for square images (arXiv:2403.03206 eq. 23).

        SD3: s grows with the side length `side` (pixels), equals `shift` at the side `native`, and is at least 1.
        Flux: s = exp(mu), where mu is linear in the number of `tokens`, as in diffusers' FluxPipeline.
        """
        if self.dynamic is None:
            return max(1.0, self.shift * side / native)
        n0, n1, mu0, mu1 = self.dynamic
        return math.exp(mu0 + (tokens - n0) * (mu1 - mu0) / (n1 - n0))


AnySchedule = Schedule | FlowSchedule


def read_schedule(config: dict[str, Any]) -> AnySchedule:
    """Reads the schedule from the content of a scheduler_config.json.

    Raises:
        BadInput: its prediction type or its kind of schedule is not supported.
    """
    flow = str(config.get("_class_name", "")).startswith("FlowMatch")
    return FlowSchedule.from_config(config) if flow else Schedule.from_config(config)


def _alphas_cumprod(config: dict[str, Any]) -> Tensor:
    """abar_t [T], float32, computed in float32 throughout like diffusers' schedulers."""
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32)
    elif kind == "squaredcos_cap_v2":
        betas = _cosine_betas(steps)
    else:
        raise BadInput(
            f"the base's beta_schedule is {kind!r}; only scaled_linear, linear and squaredcos_cap_v2 are supported: "
            "choose "
            "another base"
        )
    if config.get("rescale_betas_zero_snr"):
        betas = _zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0)


def _cosine_betas(steps: int) -> Tensor:
    """arXiv:2102.09672 eq. 17: abar_t = cos^2(((t/T + s)/(1 + s)) pi/2) with s = .008, betas capped at .999."""

    def level(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - level((n + 1) / steps) / level(n / steps), 0.999) for n in range(steps)])


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """arXiv:2305.08891 algorithm 1: shifts sqrt(abar) so that its last value is 0, and scales it so that its first
    value does not change."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root**2
    return 1.0 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
