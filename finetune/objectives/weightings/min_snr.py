"""Min-SNR (arXiv:2303.09556)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.objectives.weightings.base import Weighting

if TYPE_CHECKING:
    from torch import Tensor


class MinSNR(Weighting):
    """min(SNR, gamma) for x0 (arXiv:2303.09556 eq. 7); the paper uses gamma = 5."""

    kind: Literal["min_snr"] = "min_snr"
    gamma: float = Field(default=5.0, gt=0)

    def in_x0(self, snr: Tensor) -> Tensor:
        return snr.clamp(max=self.gamma)
