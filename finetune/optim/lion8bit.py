"""bitsandbytes' Lion with 8-bit momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from finetune.optim.base import Beta, Optimiser, Window
from finetune.optim.unwaiting import unwaiting

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Lion8bit(Optimiser):
    """Lion (arXiv:2302.06675): steps by the sign of the momentum. Its rate should be 3 to 10 times below AdamW's."""

    state_bytes: ClassVar[float] = 1.02
    whole: ClassVar[str] = ""
    shards: ClassVar[Literal["any", "same", "none"]] = "same"
    packages: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    min_8bit_size: ClassVar[int] = 4096
    kind: Literal["lion8bit"] = "lion8bit"
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(default=0.01, ge=0)

    def build(self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None) -> Optimizer:
        import bitsandbytes as bnb

        optimizer: Optimizer = unwaiting(bnb.optim.Lion8bit)(
            self.groups(trained, windows),
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            min_8bit_size=self.min_8bit_size,
        )
        return optimizer
