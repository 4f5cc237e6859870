"""The method seam: what is trained, and what leaves the run. A new method is one new file in this folder.

A recipe is made of these classes, so modules here import torch and PEFT inside functions only: `tests/config` sees to
it. Classes of torch modules live in `layers/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from finetune.core.settings import Settings
from finetune.methods.start import ReferenceModel, copied_distance, parameter_bytes, reference_copy
from finetune.optim.base import Window

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from finetune.families.base import Family

Part = Literal["denoiser", "text_encoders"]
Artifact = Literal["adapter", "weights", "embedding"]


class Method(Settings, ABC):
    """A recipe's `method:` section is the constructor of one of these (pydantic, unknown keys refused)."""

    low_rank: ClassVar[bool] = False  # whether it is B A as it stands: what leaves the run is what was trained
    artifacts: ClassVar[tuple[Artifact, ...]] = (
        "adapter",
    )  # what leaves the run: `finetune.export` has formats for each
    rests: ClassVar[bool] = False  # whether `windows` lets some weights rest, which not every optimiser can
    kind: str
    parts: list[Part] = Field(default=["denoiser"], min_length=1)

    def part_names(self, family: Family) -> list[str]:
        """`parts` as names in `family.parts`: "text_encoders" means all that the family lets train."""
        texts = family.trainable_text_encoders
        names = [name for part in self.parts for name in ([part] if part == "denoiser" else texts)]
        return list(dict.fromkeys(names))

    def add_subject_token(self, family: Family, token: str, noun: str | None) -> str | None:
        """What stands for the subject in prompts, where the method brings a word of its own (`family` learns to read
        it, before `attach`); None where it is a token that the base has. `token` is the recipe's."""
        return None

    @property
    def has_text_lr(self) -> bool:
        """Whether anything of the text encoders is trained, so that `optim.text_lr` says something."""
        return "text_encoders" in self.parts

    @property
    def has_windows(self) -> bool:
        """Whether some of what it trains rests for a share of the run."""
        return type(self).windows is not Method.windows

    def windows(self, trained: Mapping[str, nn.Parameter]) -> dict[str, Window]:
        """Name -> the share of the run in which it is trained, for those that are not trained from start to end."""
        return {}

    @property
    def adapter(self) -> Method:
        """The part of the method that leaves the run as an adapter."""
        return self

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
    def adapted_modules(self, family: Family) -> int:
        """How many of an attached family's modules are trained, or have an adapter."""

    def new_vectors(self, family: Family) -> int:
        """How many embeddings of new words an attached family trains."""
        return 0

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
        import torch

        return compute if self.is_adapter else torch.float32

    def autocast_dtype(self, compute: torch.dtype) -> torch.dtype | None:
        """What fp32 weights compute in: under autocast where training is full and in a half precision."""
        import torch

        return None if self.is_adapter or compute == torch.float32 else compute

    def base_of(self, family: Family) -> ReferenceModel:
        """The base as it was, to be asked while the family trains; called when the method has just been attached."""
        return reference_copy(family, self.part_names(family))

    @property
    def measures_distance(self) -> bool:
        """Whether `distance` is the distance between weights of the model, and no other."""
        return not self.is_adapter

    def distance(self, family: Family, trained: dict[str, nn.Parameter]) -> Callable[[], Tensor]:
        """sum |theta - theta_0|^2 over the model's weights, a float32 scalar with gradient; called as `base_of`."""
        return copied_distance(trained)

    def reference_bytes(self, family: Family) -> int:
        """What `base_of` or `distance` holds in memory beside the model."""
        return parameter_bytes(family, self.part_names(family))
