"""P2 (arXiv:2204.00227)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.objectives.weightings.base import Weighting

if TYPE_CHECKING:
    from torch import Tensor


class P2(Weighting):
    """SNR / (1 + SNR)^gamma for x0, which is 1 / (1 + SNR)^gamma for epsilon (arXiv:2204.00227 eq. 8, k = 1)."""

    kind: Literal["p2"] = "p2"
    gamma: float = Field(default=1.0, gt=0)

    def in_x0(self, snr: Tensor) -> Tensor:
        return snr / (1 + snr) ** self.gamma
