"""torch's AdamW (arXiv:1711.05101)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from finetune.optim.base import Adam, Window

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class AdamW(Adam):
    """torch's AdamW, fused: one kernel for all parameters."""

    state_bytes: ClassVar[float] = 8.0
    whole: ClassVar[str] = ""
    shards: ClassVar[Literal["any", "same", "none"]] = "any"
    kind: Literal["adamw"] = "adamw"

    def build(self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None) -> Optimizer:
        import torch

        return torch.optim.AdamW(
            self.groups(trained, windows),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )
