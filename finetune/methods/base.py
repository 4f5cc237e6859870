"""The method seam: what is trained, and what leaves the run. A new method is one new file in this folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from finetune.families.base import Family
from finetune.methods.start import BaseOf, copied_distance, frozen_twin, parameter_bytes
from finetune.settings import Settings

Part = Literal["denoiser", "text_encoders"]


class Method(Settings, ABC):
    """A recipe's `method:` section is the constructor of one of these (pydantic, unknown keys refused)."""

    kind: str
    parts: list[Part] = Field(["denoiser"], min_length=1)

    def part_names(self, family: Family) -> list[str]:
        """`parts` as names in `family.parts`: "text_encoders" means all that the family lets train."""
        texts = family.trainable_text_encoders
        names = [name for part in self.parts for name in ([part] if part == "denoiser" else texts)]
        return list(dict.fromkeys(names))

    def trains_texts(self, family: Family) -> bool:
        return bool(set(family.text_encoders) & set(self.part_names(family)))

    @property
    @abstractmethod
    def is_adapter(self) -> bool:
        """Whether the base stays as it is: then it may be held in bf16 and the result is an adapter file."""

    @abstractmethod
    def attach(self, family: Family, seed: int) -> dict[str, nn.Parameter]:
        """Makes the family trainable in place.

        Returns the trained parameters, fp32, by stable full name
        ("denoiser.down_blocks.0...lora_A.default.weight"). The same seed gives the same weights. Everything else
        keeps requires_grad=False.
        """

    @abstractmethod
    def state_dict(self, family: Family) -> dict[str, Tensor]:
        """What was trained, as it leaves the run: "denoiser.<path>.lora_A.weight" for LoRA (without
        `text_model.`), "denoiser.<parameter>" for full."""

    @abstractmethod
    def load_state_dict(self, family: Family, state: dict[str, Tensor]) -> None:
        """The inverse, on an attached family.

        Raises:
            BadInput: keys are missing or unknown.
        """

    def weight_dtype(self, compute: torch.dtype) -> torch.dtype:
        """The dtype in which the base is loaded: an adapter's base is cast once, trained weights stay fp32."""
        return compute if self.is_adapter else torch.float32

    def base_of(self, family: Family) -> BaseOf:
        """The base as it was, to be asked while the family trains; called when the method has just been attached."""
        return frozen_twin(family, self.part_names(family))

    @property
    def measures_distance(self) -> bool:
        """Whether `distance` is the distance between weights of the model, and no other."""
        return not self.is_adapter

    def distance(self, family: Family, trained: dict[str, nn.Parameter]) -> Callable[[], Tensor]:
        """sum |theta - theta_0|^2 over the model's weights, a float32 scalar with gradient; called as `base_of`."""
        return copied_distance(trained)

    def copied_bytes(self, family: Family) -> int:
        """What `base_of` or `distance` holds in memory beside the model."""
        return parameter_bytes(family, self.part_names(family))
