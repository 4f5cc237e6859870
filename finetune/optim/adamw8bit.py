"""Optimisers by kind, and the learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from finetune.optim.base import Optimiser, Window

if TYPE_CHECKING:
    import torch
    from torch import nn


class AdamW8bit(Optimiser):
    """bitsandbytes' AdamW with 8-bit state (arXiv:2110.02861): 2.03 bytes per parameter instead of 8."""

    kind: Literal["adamw8bit"] = "adamw8bit"
    min_8bit_size: ClassVar[int] = 4096

    def build(
        self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None
    ) -> torch.optim.Optimizer:
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(
            self.groups(trained, windows),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            min_8bit_size=self.min_8bit_size,
        )
