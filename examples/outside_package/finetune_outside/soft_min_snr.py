"""Soft-min-SNR (arXiv:2401.11605), for finetune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.objectives.weightings.base import Weighting

if TYPE_CHECKING:
    from torch import Tensor


class SoftMinSNR(Weighting):
    """SNR gamma / (SNR + gamma): min(SNR, gamma) without its corner, after arXiv:2401.11605."""

    kind: Literal["soft_min_snr"] = "soft_min_snr"
    gamma: float = Field(default=4.0, gt=0)

    def in_x0(self, snr: Tensor) -> Tensor:
        return snr * self.gamma / (snr + self.gamma)
