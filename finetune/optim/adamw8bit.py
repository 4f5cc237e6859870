"""bitsandbytes' AdamW with 8-bit moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from finetune.optim.base import Adam, Window
from finetune.optim.unwaiting import unwaiting

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class AdamW8bit(Adam):
    """bitsandbytes' AdamW with 8-bit state (arXiv:2110.02861): 2.03 bytes per parameter instead of 8."""

    state_bytes: ClassVar[float] = 2.03  # two moments of 1 byte, each with a scale of 4 bytes for 256 values
    whole: ClassVar[str] = ""
    shards: ClassVar[Literal["any", "same", "none"]] = "same"
    packages: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    min_8bit_size: ClassVar[int] = 4096
    kind: Literal["adamw8bit"] = "adamw8bit"

    def build(self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None) -> Optimizer:
        import bitsandbytes as bnb

        optimizer: Optimizer = unwaiting(bnb.optim.AdamW8bit)(
            self.groups(trained, windows),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            min_8bit_size=self.min_8bit_size,
        )
        return optimizer
