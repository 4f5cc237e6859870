"""The interface of training methods: what is trained, and what is exported. A new method is one new file here.

Recipes are made of these classes, so modules here import torch and PEFT only inside functions (`tests/config` checks
it). Torch modules are in `layers/`.
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
Artifact = Literal["adapter", "native", "weights", "embedding"]


class Method(Settings, ABC):
    """A training method. A recipe's `method:` section holds its fields (pydantic; unknown keys are refused)."""

    # whether the trained change is `scale` B A, so that a LoRA file holds it exactly: `state_dict` has
    # MODULE.lora_A.weight and MODULE.lora_B.weight
    low_rank: ClassVar[bool] = False
    artifacts: ClassVar[tuple[Artifact, ...]] = (
        "adapter",
    )  # the kinds of training results: `finetune.export` has formats for each
    rests: ClassVar[bool] = False  # whether `windows` keeps some weights fixed at times; not all optimisers can
    shards: ClassVar[bool] = False  # whether it needs no weight of the base before they are cut (`run.shard`)
    holds_bf16: ClassVar[bool] = False  # whether its weights get the family's `trained_dtype` (`run.weights`)
    kind: str
    parts: list[Part] = Field(default=["denoiser"], min_length=1)

    def part_names(self, family: Family) -> list[str]:
        """`parts` as names in `family.parts`: "text_encoders" stands for all trainable text encoders."""
        texts = family.trainable_text_encoders
        names = [name for part in self.parts for name in ([part] if part == "denoiser" else texts)]
        return list(dict.fromkeys(names))

    def add_subject_token(self, family: Family, token: str, noun: str | None) -> str | None:
        """Adds a new word for the subject to the family's tokenizers and text encoders. Call it before `attach`.

        `token` is the recipe's token, and `noun` the subject's class. Returns the word for prompts; None if the method
        uses a token that the base already has.
        """
        return None

    def check_fits(self, family: Family) -> None:
        """Asked before a run writes anything.

        Raises:
            BadInput: the family has nothing that the method could train as it is set.
        """

    @property
    def has_text_lr(self) -> bool:
        """Whether text-encoder weights are trained, so that `optim.text_lr` has an effect."""
        return "text_encoders" in self.parts

    @property
    def has_windows(self) -> bool:
        """Whether some of what it trains rests for a share of the run."""
        return type(self).windows is not Method.windows

    @property
    def named_windows(self) -> dict[str, Window]:
        """What it trains, in words, -> the window of its training; empty if all is trained throughout."""
        return {}

    def windows(self, trained: Mapping[str, nn.Parameter]) -> dict[str, Window]:
        """Parameter name -> (start, end) of its training, as shares of the run (0 to 1), for the parameters that are
        not trained throughout."""
        return {}

    @property
    def scale(self) -> float:
        """What B A is multiplied by, where the method is `low_rank`."""
        return 1.0

    @property
    def adapter(self) -> Method:
        """The part of the method that is exported as an adapter."""
        return self

    def trains_texts(self, family: Family) -> bool:
        """Whether a text encoder of `family` is trained."""
        return bool(set(family.text_encoders) & set(self.part_names(family)))

    @property
    @abstractmethod
    def is_adapter(self) -> bool:
        """Whether the base's own weights stay unchanged: it may then be loaded in bf16, and the result is an
        adapter."""

    @abstractmethod
    def attach(self, family: Family, seed: int) -> dict[str, nn.Parameter]:
        """Makes the family trainable, in place. The same seed creates the same initial weights.

        Returns the trained parameters by full name ("denoiser.down_blocks.0...lora_A.default.weight"): fp32, or the
        family's `trained_dtype` if the method `holds_bf16`. All other parameters keep requires_grad=False.

        Raises:
            BadInput: the family has no modules that this method can train.
        """

    @abstractmethod
    def adapted_modules(self, family: Family) -> int:
        """The number of modules of an attached family that are trained or have an adapter."""

    def new_vectors(self, family: Family) -> int:
        """The number of new embeddings that are trained in an attached family."""
        return 0

    @abstractmethod
    def state_dict(self, family: Family) -> dict[str, Tensor]:
        """The trained tensors by name: for LoRA "denoiser.<path>.lora_A.weight" (without `text_model.`), for full
        training "denoiser.<parameter>"."""

    @abstractmethod
    def load_state_dict(self, family: Family, state: dict[str, Tensor]) -> None:
        """Loads what `state_dict` returned into an attached family.

        Raises:
            BadInput: keys are missing or unknown.
        """

    def weight_dtype(self, compute: torch.dtype) -> torch.dtype:
        """The dtype for loading the base: `compute` for adapters; fp32 if the base's own weights are trained."""
        import torch

        return compute if self.is_adapter else torch.float32

    def autocast_dtype(self, compute: torch.dtype) -> torch.dtype | None:
        """The dtype for autocast: `compute` for full training in a half precision, otherwise None."""
        import torch

        return None if self.is_adapter or compute == torch.float32 else compute

    def base_of(self, family: Family) -> ReferenceModel:
        """The base as it was before training, for predictions during training. Call it right after `attach`."""
        return reference_copy(family, self.part_names(family))

    @property
    def measures_distance(self) -> bool:
        """Whether `distance` can measure how far the model's weights are from the base's."""
        return not self.is_adapter

    def distance(self, family: Family, trained: dict[str, nn.Parameter]) -> Callable[[], Tensor]:
        """A function that returns sum |theta - theta_0|^2 over the model's weights, as a float32 scalar with gradient.
        Call this method right after `attach`."""
        return copied_distance(trained)

    def reference_bytes(self, family: Family) -> int:
        """The memory in bytes that `base_of` or `distance` needs in addition to the model."""
        return parameter_bytes(family, self.part_names(family))
