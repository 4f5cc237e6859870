"""The interface of loss weights: functions of the signal-to-noise ratio (SNR), with their own settings.

Modules here import torch only when a weight is computed, so that recipes can be read without it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from finetune.core.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.objectives.schedule import Prediction

LOWEST, HIGHEST = 1e-8, 1e8  # the range of SNRs: the SNR of a float32 abar is below 2e7, or infinite


class Weighting(Settings):
    """The settings of a loss weight, and its formula. A new one is a file with a subclass and its `kind`.

    Papers define their weight for one kind of prediction. Here all are defined for the x0 loss, and converted with
    |eps^ - eps|^2 = SNR |x0^ - x0|^2 and |v^ - v|^2 = (SNR + 1) |x0^ - x0|^2 (arXiv:2202.00512 section 4).
    """

    kind: str

    @abstractmethod
    def in_x0(self, snr: Tensor) -> Tensor:
        """The weights [B] of the x0 loss, finite and above 0, for SNRs [B], float32, from `LOWEST` to `HIGHEST`."""

    def weight(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """The weights [B] of |prediction - target|^2 at these SNRs [B]. SNRs of 0 and infinity, where a formula may be
        0/0, are replaced by the nearest value in the range."""
        snr = snr.clamp(min=LOWEST, max=HIGHEST)
        in_x0 = self.in_x0(snr)
        if prediction == "sample":
            return in_x0
        return in_x0 / snr if prediction == "epsilon" else in_x0 / (snr + 1)


class Unweighted(Settings):
    """No weighting: all timesteps count equally in the loss of the base's own prediction."""

    kind: Literal["none"] = "none"

    def weight(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """Ones [B]."""
        return snr.new_ones(snr.shape)
