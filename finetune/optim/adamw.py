"""Optimisers by kind, and the learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from finetune.optim.base import Optimiser, Window

if TYPE_CHECKING:
    import torch
    from torch import nn


class AdamW(Optimiser):
    """torch's AdamW, fused: one kernel for all parameters."""

    kind: Literal["adamw"] = "adamw"

    def build(
        self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None
    ) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(
            self.groups(trained, windows),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )
