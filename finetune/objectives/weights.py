"""Loss weights by timestep, as functions of the signal-to-noise ratio.

A paper gives its weight for one prediction; all are written here for the x0 loss and turned into the others' by
|eps^ - eps|^2 = SNR |x0^ - x0|^2 and |v^ - v|^2 = (SNR + 1) |x0^ - x0|^2 (arXiv:2202.00512 section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.objectives.schedule import Prediction

Weighting = Literal["none", "min_snr", "debiased", "p2"]


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) (arXiv:2303.09556 eq. 7); the paper's gamma is 5."""
    return snr.clamp(max=gamma)


def debiased(snr: Tensor, gamma: float) -> Tensor:
    """SNR / sqrt(SNR), that is 1 / sqrt(SNR) for epsilon (arXiv:2310.08442 eq. 11), with SNR at most 1000."""
    return snr / snr.clamp(max=1000).sqrt()


def p2(snr: Tensor, gamma: float) -> Tensor:
    """SNR / (1 + SNR)^gamma, that is 1 / (1 + SNR)^gamma for epsilon (arXiv:2204.00227 eq. 8, k = 1)."""
    return snr / (1 + snr) ** gamma


WEIGHTS: dict[Weighting, Callable[[Tensor, float], Tensor]] = {"min_snr": min_snr, "debiased": debiased, "p2": p2}
GAMMA = {"min_snr": 5.0, "debiased": 0.0, "p2": 1.0}  # the papers'


def weight(weighting: Weighting, gamma: float | None, snr: Tensor, prediction: Prediction) -> Tensor:
    """The weight of |prediction - target|^2 at these SNRs [B]; at SNR 0, where epsilon's would be 0/0, its limit."""
    snr = snr.clamp(min=1e-8)
    in_x0 = WEIGHTS[weighting](snr, GAMMA[weighting] if gamma is None else gamma)
    if prediction == "sample":
        return in_x0
    return in_x0 / snr if prediction == "epsilon" else in_x0 / (snr + 1)
