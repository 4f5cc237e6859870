"""Debiased estimation (arXiv:2310.08442)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from finetune.objectives.weightings.base import Weighting

if TYPE_CHECKING:
    from torch import Tensor


class Debiased(Weighting):
    """SNR / sqrt(min(SNR, 1000)) for x0, which is 1 / sqrt(SNR) for epsilon up to SNR = 1000 (arXiv:2310.08442 eq.
    11)."""

    kind: Literal["debiased"] = "debiased"

    def in_x0(self, snr: Tensor) -> Tensor:
        return snr / snr.clamp(max=1000).sqrt()
