"""Pivotal tuning (after arXiv:2106.05744; for diffusion models cloneofsimo/lora): trains a new word, then a LoRA.

For the first `pivot` (a share) of the steps, only the new embeddings are trained. Then the LoRA is trained, and the
embeddings stay fixed, unless `keep_training_token` is set. Each has its own learning-rate schedule over its own steps.
Gradients are computed for both throughout, so Adam's moments are ready when the LoRA's training starts. A learning
rate of 0 keeps weights bit-identical with AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from finetune.methods.lora import LoRA
from finetune.methods.peft_adapter import MOST_RANK
from finetune.methods.textual_inversion import Inversion
from finetune.optim.base import WHOLE, Window

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.families.base import Family


class Pivotal(Inversion):
    """Trains a new word, then a LoRA. `parts`, `rank`, `alpha`, `dropout`, `targets` and `rank_stabilised` apply to
    the LoRA."""

    artifacts: ClassVar = ("adapter", "embedding")
    rests: ClassVar[bool] = True
    kind: Literal["pivotal"] = "pivotal"
    pivot: float = Field(default=0.5, gt=0, lt=1)
    keep_training_token: bool = False
    rank: int = Field(default=16, ge=1, le=MOST_RANK)
    alpha: float | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["attention", "all-linear", "conv", "cross-kv"] = "all-linear"
    rank_stabilised: bool = False

    @property
    def adapter(self) -> LoRA:
        return LoRA(
            parts=self.parts,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            targets=self.targets,
            rank_stabilised=self.rank_stabilised,
        )

    @property
    def has_text_lr(self) -> bool:
        return True

    def part_names(self, family: Family) -> list[str]:
        """The LoRA's parts, and the text encoders with the new embeddings."""
        return list(dict.fromkeys([*super().part_names(family), *family.trainable_text_encoders]))

    def check_fits(self, family: Family) -> None:
        self.adapter.check_fits(family)

    def attach(self, family: Family, seed: int) -> dict[str, nn.Parameter]:
        return self.adapter.attach(family, seed) | self.attach_rows(family)

    def adapted_modules(self, family: Family) -> int:
        return self.adapter.adapted_modules(family)

    @property
    def named_windows(self) -> dict[str, Window]:
        token = WHOLE if self.keep_training_token else (0.0, self.pivot)
        split = f"(method.pivot {self.pivot:g})"
        return {f"the new word {split}": token, f"the LoRA {split}": (self.pivot, 1.0)}

    def windows(self, trained: Mapping[str, nn.Parameter]) -> dict[str, Window]:
        token, adapter = self.named_windows.values()
        return {name: token if name.endswith(".new.rows") else adapter for name in trained}

    def state_dict(self, family: Family) -> dict[str, Tensor]:
        rows = {name: parameter.detach().clone() for name, parameter in self.rows(family).items()}
        return self.adapter.state_dict(family) | rows

    def load_state_dict(self, family: Family, state: dict[str, Tensor]) -> None:
        own = self.rows(family).keys()
        self.load_rows(family, {name: value for name, value in state.items() if name in own})
        self.adapter.load_state_dict(family, {name: value for name, value in state.items() if name not in own})
