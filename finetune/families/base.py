"""The family seam: the only place where SD1, SD2, SDXL, ... differ.

A new family is one new file in this folder that defines a `Family` subclass; `finetune.families` finds it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.core.batch import Geometry, Latents
from finetune.core.errors import BadInput
from finetune.objectives.schedule import AnySchedule, FlowSchedule


@dataclass(frozen=True)
class Labels:
    """What files of a family call it: kohya's `ss_base_model_version`, modelspec's architecture and implementation,
    and the "sd version" of Forge's sidecars. `v_*` for bases that predict v."""

    kohya: str
    architecture: str
    implementation: str
    sidecar: str
    prediction: str = "epsilon"  # "" for flows, which modelspec has no word for
    v_kohya: str = ""
    v_architecture: str = ""


@dataclass(frozen=True)
class ImageCondition:
    """What a picture is drawn from, by bases that draw from pictures.

    `picture` [3, H, W] and `beside` [1, H, W] (the mask of what is painted, or a depth map) are in [0, 1];
    `guidance` is how closely an edit keeps to the picture (arXiv:2211.09800 eq. 3).
    """

    image: Tensor
    beside: Tensor | None = None
    guidance: float = 1.5


class Family(ABC):
    """A loaded base model: its parts, and how a prompt, a picture and a prediction are made with them.

    Attributes:
        parts: "denoiser", "vae", "text_encoder" and for some "text_encoder_2" and "_3": plain modules, frozen and in
            eval mode after loading; a method unfreezes what it trains.
        tokenizers: one per text encoder, in the same order.
        schedule: noise schedule and prediction type, from the base's scheduler config.
        folder: the diffusers folder it was loaded from (a local path, also for hub ids).
    """

    name: ClassVar[str]  # "sd1", "sdxl", "flux": also what recipes, exports and reports call it
    pipeline_class: ClassVar[str]  # the `_class_name` in model_index.json
    # part -> (folder of a diffusers base, class of its model)
    sources: ClassVar[dict[str, tuple[str, Any]]]
    optional: ClassVar[tuple[str, ...]] = ()  # parts that a base may lack, and a recipe may leave out
    latent_factor: int  # picture pixels per latent pixel
    latent_channels: int
    scaling: float  # latents are what the VAE gives (less an offset, in some), times this
    resolution: int  # native side length in pixels
    dtype: torch.dtype  # in which it was loaded; a VAE may be wider
    parts: dict[str, nn.Module]
    tokenizers: list[Any]
    schedule: AnySchedule
    folder: Path
    autocast: torch.dtype | None = None  # fp32 weights that compute in a half precision: drawing follows training
    device: torch.device = torch.device("cpu")  # where the parts compute: each is there while it is needed (`place`)

    # the share of the noise levels, from the lowest, that the base was trained on and is trained on
    timestep_fraction: ClassVar[float] = 1.0
    # whether it was found out what the UIs make of a LoRA for such a base
    known_to_uis: ClassVar[bool] = True
    # part -> kohya prefix ("lora_unet", "lora_te", ...): the parts that can be trained
    export_prefix: ClassVar[dict[str, str]]
    labels: ClassVar[Labels]
    # what the denoiser reads behind the noisy latents: "inpaint", "depth", "edit" (`families/conditioning.py`); and
    # whether it was made to
    inputs: str | None = None
    widened: bool = False
    # part -> parameter-name prefixes that never get a gradient (DDP fails on them unless they stay frozen)
    unused_parameters: dict[str, tuple[str, ...]] = {}

    @classmethod
    @abstractmethod
    def matches(cls, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        """Whether a diffusers folder with these configs is of this family."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, dtype: torch.dtype, without: Sequence[str] = ()) -> Family:
        """Raises BadInput where a part is missing, damaged, or can't be left out."""

    @classmethod
    @abstractmethod
    def on_meta(cls, folder: Path, dtype: torch.dtype, without: Sequence[str] = ()) -> Family:
        """The family without weights and tokenizers, from configs alone: for counting. Prompts are blank there."""

    @abstractmethod
    def lora_targets(self, part: str, choice: str) -> list[str]:
        """Full paths of the modules in `part` that a LoRA adapts; `choice` is attention, all-linear or conv."""

    @abstractmethod
    def enable_gradient_checkpointing(self, parts: Sequence[str]) -> None: ...

    @classmethod
    @abstractmethod
    def skeletons(
        cls, folder: Path, parts: Sequence[str] | None = None, device: torch.device | str = "meta"
    ) -> dict[str, nn.Module]:
        """Parts (None: those that can be trained) built from the configs: no weights are read. On another device than
        meta they are random."""

    @classmethod
    @abstractmethod
    def resolution_of(cls, folder: Path) -> int:
        """The native side length in pixels, from the configs."""

    @classmethod
    def original_names(cls, paths: Sequence[str], folder: Path) -> dict[str, list[str]]:
        """The denoiser's names in kohya's files, with dots -> the modules that one such matrix holds, by rows."""
        return {path: [path] for path in paths}

    @property
    def text_encoders(self) -> list[str]:
        return [name for name in self.parts if name.startswith("text_encoder")]

    @property
    def trainable_text_encoders(self) -> list[str]:
        return [name for name in self.text_encoders if name in self.export_prefix]

    @property
    def word_tokenizers(self) -> list[Any]:
        """The tokenizers for which a rare token must be one piece: CLIP's, which T5's never agree with."""
        return [tokenizer for tokenizer in self.tokenizers if type(tokenizer).__name__.startswith("CLIP")]

    def shift(self, side: int) -> float:
        """The resolution shift of timesteps for training pictures of this side length; 1 for none."""
        if not isinstance(self.schedule, FlowSchedule):
            return 1.0
        return self.schedule.shift_for(side, self.resolution, (side // (2 * self.latent_factor)) ** 2)

    def to(self, device: torch.device | str) -> None:
        """Computes on `device` from now on, and puts every part there."""
        self.device = torch.device(device)
        self.place(list(self.parts))

    def place(self, parts: Sequence[str]) -> None:
        """Puts `parts` on the family's device and all others into the CPU's memory: T5 need not lie beside Flux."""
        for name, part in self.parts.items():
            if name not in parts:
                part.to("cpu")
        for name in parts:
            self.parts[name].to(self.device)

    @property
    def size_multiple(self) -> int:
        """Pixels: sides that the denoiser can halve as often as it does are multiples of it."""
        return self.latent_factor

    @property
    def square_multiple(self) -> int:
        """Pixels: what a square picture's side must be a multiple of."""
        return self.latent_factor

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Latents:
        """Pixels [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, H/f, W/f], float32, no gradient."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pixels [B, 3, H, W] in [-1, 1]."""

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
        """All encoders' outputs -> the conditioning tensors; dropped ones are zero (arXiv:2403.03206 section 5.2)."""
        if kept is not None:
            kept = kept.to(next(iter(encoded[0].values())).device)  # one copy, and not one for each tensor
            encoded = [
                {name: value * _beside(keep, value) for name, value in tensors.items()}
                for keep, tensors in zip(kept, encoded, strict=True)
            ]
        return self._join(encoded)

    @abstractmethod
    def _join(self, encoded: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]: ...

    @abstractmethod
    def predict(
        self, noisy: Tensor, timesteps: Tensor, cond: dict[str, Tensor], geometry: Sequence[Geometry]
    ) -> Tensor:
        """The denoiser's raw output, latent shape; dtype of the denoiser's weights. `timesteps` [B] as the
        objective gives them. `noisy` [B, C, h, w], or with extra inputs [B, C + E, h, w]."""

    def widen(self, inputs: str) -> None:
        """Lets a plain base read extra inputs, which it does not heed before it is trained.

        Raises:
            BadInput: it can't, or it already reads others.
        """
        raise BadInput(f"base.inputs is {inputs!r}, which {self.name} can't read: use an SD 1.x, SD 2.x or SDXL base")

    @abstractmethod
    def pipeline(self, sampler: str | None = None) -> Any:
        """The diffusers pipeline around these very modules (adapted, if they are); reloads parts released
        with `release`."""

    @abstractmethod
    def check_sampler(self, sampler: str) -> None:
        """Raises BadInput for a sampler that this base can't be drawn with."""

    def sampling_arguments(self, guidance: float, negatives: Sequence[str]) -> dict[str, Any]:
        """What the pipeline is called with for a guidance scale and one negative prompt for each picture."""
        return {"guidance_scale": guidance, "negative_prompt": list(negatives)}

    def pipeline_inputs(self, side: int, count: int, steps: int, given: ImageCondition | None) -> dict[str, Any]:
        """What the pipeline is called with for `count` pictures of this side length; `given`: what they are drawn
        from, by families that draw from pictures (None: from nothing)."""
        return {"width": side, "height": side}

    @abstractmethod
    def release(self, parts: Sequence[str]) -> None:
        """Drops frozen parts from memory once their work is cached; `restore` loads them again."""

    @abstractmethod
    def restore(self, parts: Sequence[str]) -> None: ...


def _beside(keep: Tensor, value: Tensor) -> Tensor:
    return keep.to(value.dtype).view(-1, *[1] * (value.ndim - 1))
