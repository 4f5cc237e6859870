"""What a loss weight is to an objective: a function of the signal-to-noise ratio, with settings of its own.

No module here imports torch before a weight is computed: recipes are read without it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from finetune.core.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.objectives.schedule import Prediction

LOWEST, HIGHEST = 1e-8, 1e8  # of the SNR; that of a float32 abar is below 2e7, or infinite


class Weighting(Settings):
    """Settings of a loss weight, and its formula. A new one is a file with a subclass and its `kind`.

    A paper gives its weight for one prediction; all are written for the x0 loss and turned into the others' by
    |eps^ - eps|^2 = SNR |x0^ - x0|^2 and |v^ - v|^2 = (SNR + 1) |x0^ - x0|^2 (arXiv:2202.00512 section 4).
    """

    kind: str

    @abstractmethod
    def in_x0(self, snr: Tensor) -> Tensor:
        """SNRs [B], float32, from `LOWEST` to `HIGHEST` -> weights [B] of the x0 loss, finite and above 0."""

    def weight(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """The weight of |prediction - target|^2 at these SNRs [B]; at 0 and infinity, where a formula may be 0/0, that
        of the nearest SNR in the range."""
        snr = snr.clamp(min=LOWEST, max=HIGHEST)
        in_x0 = self.in_x0(snr)
        if prediction == "sample":
            return in_x0
        return in_x0 / snr if prediction == "epsilon" else in_x0 / (snr + 1)


class Unweighted(Settings):
    """Every timestep counts the same in the loss of what the base predicts, whatever that is."""

    kind: Literal["none"] = "none"

    def weight(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """1 for each sample [B]."""
        return snr.new_ones(snr.shape)
