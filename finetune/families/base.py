"""The family seam: the only place where SD1, SD2, SDXL, ... differ.

A family is four things: what loads (`parts.py`), what turns images into latents (`codec.py`), conditions and denoises
(here), what draws (`drawing.py`), and what names things in files (`naming/`). A new family is one new file in this
folder that puts them together in a `Family` subclass; `registry.FAMILIES` finds it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.core.batch import Geometry
from finetune.core.errors import BadInput
from finetune.families.codec import ImageCodec
from finetune.families.drawing import Drawing
from finetune.families.naming.base import Naming
from finetune.families.parts import Parts, PartSources, skeletons
from finetune.objectives.schedule import AnySchedule, FlowSchedule


class Family(ABC):
    """A loaded base model: how a prompt, an image and a prediction are made with its parts.

    Attributes:
        parts: its modules, frozen and in eval mode after loading; a method unfreezes what it trains.
        codec: images to latents and back.
        drawing: prompts to images, by its pipeline.
        tokenizers: one per text encoder, in the same order.
        schedule: noise schedule and prediction type, from the base's scheduler config.
        folder: the diffusers folder it was loaded from (a local path, also for hub ids).
        resolution: native side length in pixels.
        dtype: in which it was loaded; a VAE may be wider.
        autocast: fp32 weights that compute in this half precision; drawing follows training. None: no autocast.
        inputs: what the denoiser reads behind the noisy latents: "inpaint", "depth", "edit" (`conditioning.py`).
        widened: whether it was made to read them.
        unused_parameters: part -> parameter-name prefixes that never get a gradient (DDP fails on them unless they
            stay frozen).
    """

    name: ClassVar[str]  # "sd1", "sdxl", "flux": also what recipes, exports and reports call it
    pipeline_class: ClassVar[str]  # the `_class_name` in model_index.json
    sources: ClassVar[PartSources]  # part -> where it lies in a folder, and its class
    naming: ClassVar[Naming]
    # the share of the noise levels, from the lowest, that the base was trained on and is trained on
    timestep_fraction: ClassVar[float] = 1.0

    parts: Parts
    codec: ImageCodec
    drawing: Drawing
    tokenizers: list[Any]
    schedule: AnySchedule
    folder: Path
    resolution: int
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    inputs: str | None = None
    widened: bool = False
    unused_parameters: dict[str, tuple[str, ...]] = {}

    # --- recognised and loaded

    @classmethod
    @abstractmethod
    def matches(cls, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        """Whether a diffusers folder with these configs is of this family. Where one that it derives from matches
        too, this one is taken."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, dtype: torch.dtype, without: Sequence[str] = ()) -> Family:
        """Raises BadInput where a part is missing, damaged, or can't be left out."""

    @classmethod
    @abstractmethod
    def on_meta(cls, folder: Path, dtype: torch.dtype, without: Sequence[str] = ()) -> Family:
        """The family without weights and tokenizers, from configs alone: for counting. Prompts are blank there."""

    @classmethod
    @abstractmethod
    def resolution_of(cls, folder: Path) -> int:
        """The native side length in pixels, from the configs."""

    @classmethod
    def trainable_parts(cls) -> list[str]:
        """The denoiser, and the text encoders that can be trained: those that have a name in files."""
        return list(cls.naming.prefixes)

    @classmethod
    def skeletons(cls, folder: Path) -> dict[str, nn.Module]:
        """The parts that can be trained, on the meta device, from the configs."""
        return skeletons(cls.sources, folder, cls.trainable_parts())

    @property
    def device(self) -> torch.device:
        return self.parts.device

    # --- what a method trains

    @abstractmethod
    def lora_targets(self, part: str, choice: str) -> list[str]:
        """Full paths of the modules in `part` that a LoRA adapts; `choice` is attention, all-linear or conv."""

    @abstractmethod
    def enable_gradient_checkpointing(self, parts: Sequence[str]) -> None: ...

    def widen(self, inputs: str) -> None:
        """Lets a plain base read extra inputs, which it does not heed before it is trained.

        Raises:
            BadInput: it can't, or it already reads others.
        """
        raise BadInput(f"base.inputs is {inputs!r}, which {self.name} can't read: use an SD 1.x, SD 2.x or SDXL base")

    # --- sizes

    def shift(self, side: int) -> float:
        """The resolution shift of timesteps for training images of this side length in pixels; 1 for none."""
        if not isinstance(self.schedule, FlowSchedule):
            return 1.0
        return self.schedule.shift_for(side, self.resolution, (side // (2 * self.codec.factor)) ** 2)

    @property
    def size_multiple(self) -> int:
        """Pixels: sides that the denoiser can halve as often as it does are multiples of it."""
        return self.codec.factor

    @property
    def square_multiple(self) -> int:
        """Pixels: what a square image's side must be a multiple of."""
        return self.codec.factor

    # --- conditions

    @property
    def text_encoders(self) -> list[str]:
        return [name for name in self.parts if name.startswith("text_encoder")]

    @property
    def trainable_text_encoders(self) -> list[str]:
        return [name for name in self.text_encoders if name in self.naming.prefixes]

    @property
    def word_tokenizers(self) -> list[Any]:
        """The tokenizers for which a rare token must be one piece: CLIP's, which T5's never agree with. All, where
        there is no CLIP."""
        clip = [tokenizer for tokenizer in self.tokenizers if type(tokenizer).__name__.startswith("CLIP")]
        return clip or self.tokenizers

    def encode_prompts(self, prompts: Sequence[str], kept: Tensor | None = None) -> dict[str, Tensor]:
        """Prompts -> conditioning tensors, first dimension len(prompts); with gradients if encoders train.

        `kept` [encoders, B] is 0 where an encoder's output is dropped, and 1 elsewhere.
        """
        return self.join_texts([self.encode_text(n, prompts) for n in range(len(self.text_encoders))], kept)

    @abstractmethod
    def text_length(self, index: int) -> int:
        """How many tokens the `index`-th text encoder reads."""

    @abstractmethod
    def encode_text(self, index: int, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the `index`-th text encoder gives, first dimension len(prompts)."""

    def join_texts(self, encoded: Sequence[dict[str, Tensor]], kept: Tensor | None = None) -> dict[str, Tensor]:
        """All encoders' outputs -> the conditioning tensors; dropped ones are zero (arXiv:2403.03206 section 5.2).
        What an image would add stands at `blank_image_conditions`."""
        if kept is not None:
            kept = kept.to(next(iter(encoded[0].values())).device)  # one copy, and not one for each tensor
            encoded = [
                {name: value * _aligned(keep, value) for name, value in tensors.items()}
                for keep, tensors in zip(kept, encoded, strict=True)
            ]
        joined = self._join(encoded)
        return joined | self.blank_image_conditions(len(next(iter(joined.values()))))

    @abstractmethod
    def _join(self, encoded: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]: ...

    @property
    def image_encoders(self) -> list[str]:
        """The parts with which `encode_image_conditions` computes."""
        return []

    def encode_image_conditions(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] of training images -> the conditions that are made of the image itself, such
        as unCLIP's image embedding (arXiv:2204.06125 section 2): first dimension B, no gradient. {} for none.

        They are cached beside the latents, and take the place of those of the same name in `encode_prompts`.
        """
        return {}

    def blank_image_conditions(self, count: int) -> dict[str, Tensor]:
        """What `encode_image_conditions` gives where there is no image, by the same names: first dimension `count`."""
        return {}

    # --- denoises

    @abstractmethod
    def predict(
        self, noisy: Tensor, timesteps: Tensor, cond: dict[str, Tensor], geometry: Sequence[Geometry]
    ) -> Tensor:
        """What the objective compares: the denoiser's output in the latents' shape (a predicted variance is left out);
        dtype of the denoiser's weights.

        `timesteps` [B] as the objective gives them. `noisy` [B, C, h, w], or with extra inputs [B, C + E, h, w].
        """


def _aligned(keep: Tensor, value: Tensor) -> Tensor:
    return keep.to(value.dtype).view(-1, *[1] * (value.ndim - 1))
