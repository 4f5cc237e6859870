"""LoRA-FA (arXiv:2308.03303), for finetune."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import peft
from torch import nn

from finetune.families.base import Family
from finetune.methods.peft_adapter import Ranked


class LoRAFA(Ranked):
    """A LoRA that trains only B. A keeps its initial values, so the backward pass needs less memory."""

    marks: ClassVar = (".lora_",)  # A is saved too: B is useless without it
    low_rank: ClassVar = True
    kind: Literal["lora_fa"] = "lora_fa"

    def config(self, targets: list[str]) -> Any:
        return peft.LoraConfig(r=self.rank, lora_alpha=self.peft_alpha, target_modules=targets)

    def attach(self, family: Family, seed: int) -> dict[str, nn.Parameter]:
        both = super().attach(family, seed)
        for name, parameter in both.items():
            parameter.requires_grad_(".lora_B." in name)
        return {name: parameter for name, parameter in both.items() if parameter.requires_grad}
