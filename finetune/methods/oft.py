"""OFT through PEFT (arXiv:2306.07280): W R^T with R orthogonal and block-diagonal, R = (I - Q) (I + Q)^-1, Q skew."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from finetune.core.errors import BadInput
from finetune.methods.peft_adapter import ADAPTER, MOST_RANK, PeftAdapter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.families.base import Family


class OFT(PeftAdapter):
    """Rotates the inputs of linear layers.

    With PEFT's OFT on convolutions, training does not start from the base. So `targets: conv` is refused, and the 1x1
    convolutions around SD1's attention blocks are not adapted. `block_size`: side of the rotated blocks; a layer whose
    width it does not divide uses the nearest divisor.
    """

    marks: ClassVar = (".oft_R.",)
    kind: Literal["oft"] = "oft"
    targets: Literal["attention", "all-linear", "cross-kv"] = "all-linear"
    block_size: int = Field(default=32, ge=2, le=MOST_RANK)

    def config(self, targets: list[str]) -> Any:
        import peft

        return peft.OFTConfig(oft_block_size=self.block_size, use_cayley_neumann=False, target_modules=targets)

    def target_modules(self, family: Family, part: str) -> list[str]:
        from torch import nn

        modules = dict(family.parts[part].named_modules())
        found = [path for path in super().target_modules(family, part) if isinstance(modules[path], nn.Linear)]
        if not found:
            raise BadInput(
                f"method.kind is oft but method.targets={self.targets} chooses no linear layer of {part}: use lora"
            )
        return found

    def attach(self, family: Family, seed: int) -> dict[str, nn.Parameter]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Invalid `oft_block_size`")  # docs/recipes.md explains it
            return super().attach(family, seed)

    def delta(self, layer: Any) -> Tensor:
        """W (R^T - I), since the layer computes x R W^T."""
        import torch

        from finetune.core.devices import doubled

        weight = doubled(layer.get_base_layer().weight)
        rotation = doubled(layer.get_delta_weight(ADAPTER))
        return (weight @ (rotation.T - torch.eye(len(rotation), dtype=torch.double, device=weight.device))).float()
