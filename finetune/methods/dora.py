"""DoRA through PEFT (arXiv:2402.09353): m (W + s B A) / ||W + s B A||, the norm of each output's weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from finetune.methods.peft_adapter import ADAPTER, Ranked

if TYPE_CHECKING:
    from torch import Tensor


class DoRA(Ranked):
    """LoRA for the direction of the weights, and a trained magnitude m for each output."""

    artifacts: ClassVar = ("adapter", "native")
    marks: ClassVar = (".lora_",)
    kind: Literal["dora"] = "dora"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rank_stabilised: bool = False

    def config(self, targets: list[str]) -> Any:
        import peft

        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.peft_alpha,
            lora_dropout=self.dropout,
            use_rslora=self.rank_stabilised,
            use_dora=True,
            target_modules=targets,
        )

    def prepare(self, layer: Any) -> None:
        """Computes the magnitude in fp32. PEFT uses the base's dtype: with bf16 the start would differ from the base
        by up to 0.4 %."""
        import torch

        magnitude, weight = layer.lora_magnitude_vector[ADAPTER], layer.get_base_layer().weight.float()
        with torch.no_grad():
            norm = magnitude.get_weight_norm(weight, torch.zeros_like(weight), layer.scaling[ADAPTER])
        magnitude.weight.data = norm

    def native_tensors(self, layer: Any) -> dict[str, Tensor]:
        """`dora_scale` is m |W| / |W + s B A| for each output. ComfyUI and Forge divide it by |W|, where PEFT divides
        m by |W + s B A|: at strength 1 both give the same weight."""
        import torch

        from finetune.core.devices import doubled

        a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
        scale, weight = layer.scaling[ADAPTER], doubled(layer.get_base_layer().weight.detach()).flatten(1)
        moved = weight + scale * (doubled(b).flatten(1) @ doubled(a).flatten(1))
        magnitude = doubled(layer.lora_magnitude_vector[ADAPTER].weight.detach()).view(-1, 1)
        corrected = magnitude * weight.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)
        return {
            "lora_down.weight": a,
            "lora_up.weight": b,
            "alpha": torch.tensor(float(scale * len(a))),
            "dora_scale": corrected.view(-1, *[1] * (a.ndim - 1)).float(),
        }

    def delta(self, layer: Any) -> Tensor:
        """PEFT's merged weight minus the base weight, in float64 because the two are nearly equal."""
        from finetune.core.devices import exact_device

        own = layer.get_base_layer().weight.device
        if exact_device(own) != own:
            layer = copy.deepcopy(layer).to(exact_device(own))
        base = layer.get_base_layer()
        held = base.weight.data
        base.weight.data = held.double()
        try:
            layer.merge()
            difference: Tensor = base.weight.data - held.double()
            return difference.float()
        finally:
            base.weight.data = held
            layer.merged_adapters.clear()
