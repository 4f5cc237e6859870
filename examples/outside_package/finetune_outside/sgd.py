"""SGD with momentum, for finetune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from finetune.optim.base import Optimiser, Window

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class SGD(Optimiser):
    """torch's SGD: one buffer for each parameter."""

    state_bytes: ClassVar[float] = 4.0
    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)

    def build(self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None) -> Optimizer:
        import torch

        return torch.optim.SGD(self.groups(trained, windows), lr=self.lr, momentum=self.momentum)
