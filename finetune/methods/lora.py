"""LoRA through PEFT (arXiv:2106.09685): W + (alpha / r) B A with W frozen.

rsLoRA (arXiv:2312.03732) scales by alpha / sqrt(r).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import peft
import torch
from pydantic import Field
from torch import Tensor, nn

from finetune.errors import BadInput
from finetune.families.base import Family
from finetune.families.layout import strip_text_model
from finetune.methods.base import Method
from finetune.methods.start import BaseOf, adapted_layers, low_rank_distance, switched_off

ADAPTER = "default"


class LoRA(Method):
    """Low-rank adapters. `alpha: null` is the rank, so that the scale is 1.

    `targets`: the denoiser's attention projections, everything linear in its attention blocks, or also the
    convolutions of its residual blocks. A text encoder is adapted at its attention and MLP projections.
    """

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["attention", "all-linear", "conv"] = "all-linear"
    rank_stabilised: bool = False

    @property
    def is_adapter(self) -> bool:
        return True

    @property
    def alpha_value(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    def attach(self, family: Family, seed: int) -> dict[str, nn.Parameter]:
        trained: dict[str, nn.Parameter] = {}
        for part in self.part_names(family):
            module = family.parts[part]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                peft.inject_adapter_in_model(self._config(family, part), module, adapter_name=ADAPTER)
            for name, parameter in module.named_parameters():
                is_adapter = ".lora_" in name
                parameter.requires_grad_(is_adapter)
                if is_adapter:
                    parameter.data = parameter.data.float()
                    trained[f"{part}.{name}"] = parameter
        return trained

    def _config(self, family: Family, part: str) -> Any:
        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=cast(int, self.alpha_value),  # PEFT computes with floats too
            lora_dropout=self.dropout,
            use_rslora=self.rank_stabilised,
            target_modules=family.lora_targets(part, self.targets),
        )

    def state_dict(self, family: Family) -> dict[str, Tensor]:
        return {
            name: parameter.detach().clone()
            for part in self.part_names(family)
            for name, parameter in _adapter_parameters(family, part)
        }

    def load_state_dict(self, family: Family, state: dict[str, Tensor]) -> None:
        own = {name: p for part in self.part_names(family) for name, p in _adapter_parameters(family, part)}
        wrong = sorted(own.keys() ^ state.keys())
        if wrong:
            raise BadInput(f"the adapter and the recipe disagree on {len(wrong)} weights, such as {wrong[0]!r}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    @contextmanager
    def disabled(self, family: Family) -> Iterator[None]:
        """The base as it was: every adapter switched off inside the block."""
        with self.base_of(family)():
            yield

    def base_of(self, family: Family) -> BaseOf:
        return switched_off(family, adapted_layers(family, self.part_names(family)))

    @property
    def measures_distance(self) -> bool:
        return True

    def distance(self, family: Family, trained: dict[str, nn.Parameter]) -> Callable[[], Tensor]:
        layers = adapted_layers(family, self.part_names(family))
        return low_rank_distance(
            (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]) for layer in layers
        )

    def copied_bytes(self, family: Family) -> int:
        return 0


def _adapter_parameters(family: Family, part: str) -> Iterator[tuple[str, nn.Parameter]]:
    """("denoiser.<path>.lora_A.weight", parameter): PEFT's names without the adapter's."""
    for name, parameter in family.parts[part].named_parameters():
        if ".lora_" in name:
            yield f"{part}.{strip_text_model(name).replace(f'.{ADAPTER}.', '.')}", parameter
