"""LoHa through PEFT (FedPara, arXiv:2108.06098): W + (alpha / r) (B1 A1) * (B2 A2), a product value by value."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from finetune.methods.peft_adapter import ADAPTER, Ranked


class LoHa(Ranked):
    """Two low-rank products multiplied: a delta of rank up to r * r from twice the weights of a LoRA."""

    marks: ClassVar = (".hada_",)
    kind: Literal["loha"] = "loha"
    rank: int = Field(default=8, ge=1)

    def config(self, targets: list[str]) -> Any:
        import peft

        return peft.LoHaConfig(r=self.rank, alpha=self.peft_alpha, target_modules=targets)

    def prepare(self, layer: Any) -> None:
        never_dropped(layer)


def never_dropped(layer: Any) -> None:
    """PEFT applies a LyCORIS layer when a number drawn from [0, 1) is above module_dropout, so at 0 it leaves one out
    once in 2^24 draws of the global generator: below 0 never."""
    layer.module_dropout[ADAPTER] = -1.0
