"""The family seam: the only place where SD1, SD2, SDXL, ... differ.

A new family is one new file in this folder that defines a `Family` subclass; `finetune.families` finds it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.batch import Geometry, Latents
from finetune.objectives import Schedule


class Family(ABC):
    """A loaded base model: its parts, and how a prompt, a picture and a prediction are made with them.

    Attributes:
        parts: "denoiser", "vae", "text_encoder" and for SDXL "text_encoder_2": plain modules, frozen and in
            eval mode after loading; a method unfreezes what it trains.
        tokenizers: one per text encoder, in the same order.
        schedule: noise schedule and prediction type, from the base's scheduler config.
        folder: the diffusers folder it was loaded from (a local path, also for hub ids).
    """

    name: ClassVar[str]  # "sd1", "sd2", "sdxl": also what recipes, exports and reports call it
    pipeline_class: ClassVar[str]  # the `_class_name` in model_index.json
    latent_factor: int  # picture pixels per latent pixel
    resolution: int  # native side length in pixels
    parts: dict[str, nn.Module]
    tokenizers: list[Any]
    schedule: Schedule
    folder: Path

    # part -> kohya prefix ("lora_unet", "lora_te", ...)
    export_prefix: ClassVar[dict[str, str]]
    # part -> parameter-name prefixes that never get a gradient (DDP fails on them unless they stay frozen)
    unread: dict[str, tuple[str, ...]] = {}

    @classmethod
    @abstractmethod
    def matches(cls, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        """Whether a diffusers folder with these configs is of this family."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> Family: ...

    @abstractmethod
    def lora_targets(self, part: str, choice: str) -> list[str]:
        """Full paths of the modules in `part` that a LoRA adapts; `choice` is attention, all-linear or conv."""

    @abstractmethod
    def enable_gradient_checkpointing(self, parts: Sequence[str]) -> None: ...

    @classmethod
    @abstractmethod
    def write_tiny(cls, folder: Path, seed: int = 0) -> None:
        """Writes a small, real, randomly initialised base as a diffusers folder (for tests)."""

    @classmethod
    @abstractmethod
    def skeletons(cls, folder: Path) -> dict[str, nn.Module]:
        """The trainable parts on the meta device, from the folder's configs: no weights are read."""

    @property
    def text_encoders(self) -> list[str]:
        return [name for name in self.parts if name.startswith("text_encoder")]

    def to(self, device: torch.device | str) -> None:
        """Moves every part."""
        for part in self.parts.values():
            part.to(device)

    @property
    def size_multiple(self) -> int:
        """Pixels: sides that the denoiser can halve as often as it does are multiples of it."""
        return self.latent_factor

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Latents:
        """Pixels [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, H/f, W/f], float32, no gradient."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pixels [B, 3, H, W] in [-1, 1]."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts -> conditioning tensors, first dimension len(prompts); with gradients if encoders train."""

    @abstractmethod
    def predict(
        self, noisy: Tensor, timesteps: Tensor, cond: dict[str, Tensor], geometry: Sequence[Geometry]
    ) -> Tensor:
        """The denoiser's raw output, latent shape; dtype of the denoiser's weights."""

    @abstractmethod
    def pipeline(self, sampler: str | None = None) -> Any:
        """The diffusers pipeline around these very modules (adapted, if they are); reloads parts released
        with `release`."""

    @abstractmethod
    def release(self, parts: Sequence[str]) -> None:
        """Drops frozen parts from memory once their work is cached; `restore` loads them again."""

    @abstractmethod
    def restore(self, parts: Sequence[str], device: torch.device | str = "cpu") -> None: ...
