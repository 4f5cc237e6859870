"""LoHa through PEFT (FedPara, arXiv:2108.06098): W + (alpha / r) (B1 A1) * (B2 A2), where * is elementwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from finetune.methods.peft_adapter import ADAPTER, MOST_RANK, Ranked, tensors_of

if TYPE_CHECKING:
    from torch import Tensor


class LoHa(Ranked):
    """The elementwise product of two low-rank matrices: rank up to r * r with twice the weights of a LoRA."""

    artifacts: ClassVar = ("adapter", "native")
    marks: ClassVar = (".hada_",)
    kind: Literal["loha"] = "loha"
    rank: int = Field(default=8, ge=1, le=MOST_RANK)

    def config(self, targets: list[str]) -> Any:
        import peft

        return peft.LoHaConfig(r=self.rank, alpha=self.peft_alpha, target_modules=targets)

    def native_tensors(self, layer: Any) -> dict[str, Tensor]:
        import torch

        return tensors_of(layer) | {"alpha": torch.tensor(self.alpha_value)}

    def prepare(self, layer: Any) -> None:
        never_dropped(layer)


def never_dropped(layer: Any) -> None:
    """Sets module_dropout below 0. PEFT applies a LyCORIS layer if a random number from [0, 1) is above
    module_dropout: at 0 it would still skip a layer about once in 2^24 draws, when the number is exactly 0."""
    layer.module_dropout[ADAPTER] = -1.0
