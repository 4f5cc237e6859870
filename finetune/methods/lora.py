"""LoRA through PEFT (arXiv:2106.09685): W + (alpha / r) B A with W frozen.

rsLoRA (arXiv:2312.03732) scales by alpha / sqrt(r).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from finetune.methods.peft_adapter import ADAPTER, Ranked
from finetune.methods.start import adapted_layers, low_rank_distance

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.families.base import Family


class LoRA(Ranked):
    """Low-rank adapters.

    `init`: the initial values of A (B starts at zero): PEFT's default (uniform, He et al.) or normal with standard
    deviation 1 / r. PEFT's other kinds are not available: PiSSA, OLoRA and CorDA change the base, EVA needs data, and
    for "orthogonal" B A is zero only up to rounding.
    """

    marks: ClassVar = (".lora_",)
    low_rank: ClassVar = True
    shards: ClassVar = True
    kind: Literal["lora"] = "lora"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rank_stabilised: bool = False
    init: Literal["default", "gaussian"] = "default"

    def config(self, targets: list[str]) -> Any:
        import peft

        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.peft_alpha,
            lora_dropout=self.dropout,
            use_rslora=self.rank_stabilised,
            init_lora_weights=True if self.init == "default" else "gaussian",
            target_modules=targets,
        )

    @property
    def scale(self) -> float:
        return self.alpha_value / self.rank**0.5 if self.rank_stabilised else super().scale

    @property
    def measures_distance(self) -> bool:
        return True

    def distance(self, family: Family, trained: dict[str, nn.Parameter]) -> Callable[[], Tensor]:
        layers = adapted_layers(family, self.part_names(family))
        return low_rank_distance(
            (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]) for layer in layers
        )
