"""The interface of model families: the only place where SD1, SD2, SDXL, ... differ.

A family combines loading (`parts.py`), a codec for images and latents (`codec.py`), conditions and predictions (this
file), drawing (`drawing.py`), and the names of its weights in files (`naming/`). To add a family, add one file with a
`Family` subclass to this folder; `registry.FAMILIES` finds it.
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
    """A loaded base model. It encodes prompts, predicts for a training step, and draws images.

    Attributes:
        parts: its modules, frozen and in eval mode after loading; a method unfreezes what it trains.
        codec: converts images to latents and back.
        drawing: draws images from prompts with the family's pipeline.
        tokenizers: one for each text encoder, in the same order.
        schedule: noise schedule and prediction type, from the base's scheduler config.
        folder: the diffusers folder it was loaded from (a local path, also for hub ids).
        resolution: native side length in pixels.
        dtype: the precision it was loaded in; some parts may have a wider one.
        autocast: the half precision in which fp32 weights compute, in training and drawing. None: no autocast.
        trained_dtype: the dtype of a base's own weights once a method trains them (`run.weights`).
        inputs: extra channels after the noisy latents: "inpaint", "depth", "edit" (`conditioning.py`); None: none.
        widened: whether `widen` added those channels.
        unused_parameters: part -> prefixes of parameter names that never get a gradient. They must stay frozen,
            because DistributedDataParallel fails on them otherwise.
    """

    name: ClassVar[str]  # "sd1", "sdxl", "flux": also its name in recipes, exports and reports
    pipeline_class: ClassVar[str]  # the `_class_name` in model_index.json
    sources: ClassVar[PartSources]  # part -> its folder inside the base, and its class
    naming: ClassVar[Naming]
    # the base was trained on this share of the noise levels, from the lowest; fine-tuning uses the same share
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
    trained_dtype: torch.dtype = torch.float32
    inputs: str | None = None
    widened: bool = False
    unused_parameters: dict[str, tuple[str, ...]] = {}

    # --- recognised and loaded

    @classmethod
    @abstractmethod
    def matches(cls, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        """Whether a diffusers folder with these configs belongs to this family. If a family that it derives from
        matches too, the derived one is used."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, dtype: torch.dtype, without: Sequence[str] = ()) -> Family:
        """Loads the family from a diffusers folder, except for the parts in `without`: frozen, in eval mode.

        Raises:
            BadInput: a part is missing or damaged, or `without` names a part that is needed.
        """

    @classmethod
    @abstractmethod
    def on_meta(cls, folder: Path, dtype: torch.dtype, without: Sequence[str] = ()) -> Family:
        """The family on torch's meta device, from configs alone: without weights and tokenizers, with empty prompts.
        It is for counting parameters and memory."""

    @classmethod
    @abstractmethod
    def resolution_of(cls, folder: Path) -> int:
        """The native side length in pixels, from the configs."""

    @classmethod
    def trainable_parts(cls) -> list[str]:
        """The parts that can be trained: the denoiser, and the text encoders that have a name in exported files."""
        return list(cls.naming.prefixes)

    @classmethod
    def skeletons(cls, folder: Path) -> dict[str, nn.Module]:
        """The trainable parts on torch's meta device, built from the configs: part name -> module."""
        return skeletons(cls.sources, folder, cls.trainable_parts())

    @property
    def left_out(self) -> list[str]:
        """The parts that its folder has and that it was loaded without."""
        return [name for name, source in self.sources.items() if name not in self.parts and source.is_in(self.folder)]

    @property
    def device(self) -> torch.device:
        """The device on which the parts compute."""
        return self.parts.device

    # --- what a method trains

    @abstractmethod
    def lora_targets(self, part: str, choice: str) -> list[str]:
        """Full paths of the modules in `part` that a LoRA adapts; `choice` is "attention", "all-linear" or "conv".

        Raises:
            BadInput: the family has no modules for this choice.
        """

    @abstractmethod
    def enable_gradient_checkpointing(self, parts: Sequence[str]) -> None:
        """Makes `parts` recompute activations in the backward pass, which saves memory (arXiv:1604.06174)."""

    def widen(self, inputs: str) -> None:
        """Extends the denoiser by extra input channels. Until they are trained they do not change its output.

        Raises:
            BadInput: the family can't read these inputs, or already reads others.
        """
        raise BadInput(f"base.inputs is {inputs!r}, which {self.name} can't read: use an SD 1.x, SD 2.x or SDXL base")

    # --- sizes

    def shift(self, side: int) -> float:
        """The resolution shift of timesteps (arXiv:2403.03206 eq. 23) for square training images whose side is `side`
        pixels; 1 for none."""
        if not isinstance(self.schedule, FlowSchedule):
            return 1.0
        return self.schedule.shift_for(side, self.resolution, (side // (2 * self.codec.factor)) ** 2)

    @property
    def size_multiple(self) -> int:
        """Image sides should be multiples of this number of pixels, so that the denoiser can halve them evenly."""
        return self.codec.factor

    @property
    def square_multiple(self) -> int:
        """The side of a square image must be a multiple of this number of pixels."""
        return self.codec.factor

    # --- conditions

    @property
    def text_encoders(self) -> list[str]:
        """The names of the loaded text encoders, in order."""
        return [name for name in self.parts if name.startswith("text_encoder")]

    @property
    def trainable_text_encoders(self) -> list[str]:
        """The names of the loaded text encoders that can be trained."""
        return [name for name in self.text_encoders if name in self.naming.prefixes]

    @classmethod
    def tokenizers_of(cls, folder: Path) -> list[tuple[Any, int]]:
        """The tokenizer of each text encoder of a base's folder, and the number of tokens that the encoder reads. No
        weights are read.

        Raises:
            BadInput: a tokenizer is missing or damaged.
        """
        return []

    @property
    def word_tokenizers(self) -> list[Any]:
        """The tokenizers in which a rare token must be one piece: those of CLIP, since T5 splits such words. All
        tokenizers if the family has no CLIP."""
        clip = [tokenizer for tokenizer in self.tokenizers if type(tokenizer).__name__.startswith("CLIP")]
        return clip or self.tokenizers

    def encode_prompts(self, prompts: Sequence[str], kept: Tensor | None = None) -> dict[str, Tensor]:
        """Encodes B prompts as conditioning tensors: name -> [B, ...]. They have gradients if encoders are trained.

        `kept` [encoders, B] is 0 where an encoder's output is dropped, and 1 elsewhere.
        """
        return self.join_texts([self.encode_text(n, prompts) for n in range(len(self.text_encoders))], kept)

    @abstractmethod
    def text_length(self, index: int) -> int:
        """The number of tokens that the `index`-th text encoder reads."""

    @abstractmethod
    def encode_text(self, index: int, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of the `index`-th text encoder for B prompts: name -> [B, ...]."""

    def join_texts(self, encoded: Sequence[dict[str, Tensor]], kept: Tensor | None = None) -> dict[str, Tensor]:
        """Combines all encoders' outputs into the conditioning tensors: name -> [B, ...].

        Dropped outputs are replaced by zeros (arXiv:2403.03206 section 5.2); `kept` as in `encode_prompts`. Conditions
        from images are set to `blank_image_conditions`.
        """
        if kept is not None:
            kept = kept.to(next(iter(encoded[0].values())).device)  # one copy for all tensors
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
        """The parts that `encode_image_conditions` uses."""
        return []

    def encode_image_conditions(self, pixels: Tensor) -> dict[str, Tensor]:
        """Conditions that are computed from the training images, such as unCLIP's image embedding (arXiv:2204.06125
        section 2): name -> [B, ...], without gradient. {} if the family has none.

        `pixels` is [B, 3, H, W] in [-1, 1]. The conditions are cached together with the latents, and replace those of
        the same name from `encode_prompts`.
        """
        return {}

    def blank_image_conditions(self, count: int) -> dict[str, Tensor]:
        """The values of `encode_image_conditions` if there is no image, under the same names: [count, ...]."""
        return {}

    def size_conditions(self, geometry: Sequence[Geometry]) -> dict[str, Tensor]:
        """The conditions that follow from B images' sizes alone: name -> [B, ...], on the CPU; {} if there are none.

        A training step makes them in advance and adds them to the conditions of `predict`, which makes them itself
        where they are missing. With `run.compile: graphs`, `predict` gets no other sizes.
        """
        return {}

    # --- denoises

    @abstractmethod
    def predict(
        self, noisy: Tensor, timesteps: Tensor, cond: dict[str, Tensor], geometry: Sequence[Geometry]
    ) -> Tensor:
        """The denoiser's output [B, C, h, w], in the dtype of its weights; a predicted variance is left out.

        Args:
            noisy: noisy latents [B, C, h, w], or [B, C + E, h, w] with E channels of extra inputs.
            timesteps: [B], as `Objective.timesteps` returns them.
            cond: the conditioning tensors of `encode_prompts`, name -> [B, ...].
            geometry: the original size and crop of each image, for families that read them.
        """


def _aligned(keep: Tensor, value: Tensor) -> Tensor:
    return keep.to(value.dtype).view(-1, *[1] * (value.ndim - 1))
