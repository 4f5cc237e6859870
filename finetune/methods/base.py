"""The method seam: what is trained, and what leaves the run. A new method is one new file in this folder."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from finetune.families.base import Family
from finetune.settings import Settings

Part = Literal["denoiser", "text_encoders"]


class Method(Settings):
    """A recipe's `method:` section is the constructor of one of these (pydantic, unknown keys refused)."""

    kind: str
    parts: list[Part]
    exports: ClassVar[tuple[str, ...]]  # the export formats that can hold what this method trains

    def part_names(self, family: Family) -> list[str]:
        """`parts` as names in `family.parts`: "text_encoders" means all that the family has."""
        names = [
            name for part in self.parts for name in ([part] if part == "denoiser" else family.text_encoders)
        ]
        return list(dict.fromkeys(names))

    def weight_dtype(self, compute: torch.dtype) -> torch.dtype:
        """The dtype in which trained base parts are held: an adapter's base may be bf16, full weights stay fp32."""
        raise NotImplementedError

    @abstractmethod
    def attach(self, family: Family, seed: int) -> dict[str, nn.Parameter]:
        """Makes the family trainable in place; returns the trained parameters, fp32, by stable full name
        ("denoiser.down_blocks.0...lora_A.default.weight"). The same seed gives the same weights. Everything
        else keeps requires_grad=False."""

    @abstractmethod
    def state_dict(self, family: Family) -> dict[str, Tensor]:
        """What was trained, as leaves the run: PEFT keys per part for LoRA ("denoiser.<path>.lora_A.weight"),
        "denoiser.<parameter>" for full."""

    @abstractmethod
    def load_state_dict(self, family: Family, state: dict[str, Tensor]) -> None:
        """The inverse, on an attached family; missing or unknown keys are a BadInput."""
