"""Converts images to latents and back: with a VAE, or unchanged for models that work on pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from finetune.core.batch import Latents
from finetune.families.parts import Parts


class ImageCodec(ABC):
    """Converts images to the latents that the denoiser works on, and back.

    Attributes:
        parts: the parts of the family that it uses; empty for none.
        factor: image pixels per latent pixel, on each side.
        channels: the number of latent channels.
        scaling: latents = (VAE output - offset) * scaling; only some families have an offset.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    factor: int
    channels: int
    scaling: float = 1.0

    @abstractmethod
    def encode(self, pixels: Tensor) -> Latents:
        """Pixels [B, 3, H, W] in [-1, 1] -> mean and standard deviation of the scaled latents [B, C, H/f, W/f] with
        f = `factor`; float32, no gradient."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pixels [B, 3, H, W] in [-1, 1], float32, no gradient."""


class VaeCodec(ImageCodec):
    parts = ("vae",)

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        config = cast(Any, parts["vae"]).config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(config.latent_channels)
        self.scaling, self._offset = float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Latents:
        vae: Any = self._parts["vae"]
        latent = vae.encode(pixels.to(vae.dtype)).latent_dist
        return Latents((latent.mean.float() - self._offset) * self.scaling, latent.std.float() * self.scaling)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae: Any = self._parts["vae"]
        decoded: Tensor = vae.decode((latents / self.scaling + self._offset).to(vae.dtype)).sample
        return decoded.float()


class PixelCodec(ImageCodec):
    """The latents are the pixels themselves, with standard deviation 0 (DeepFloyd IF, arXiv:2205.11487)."""

    factor, channels = 1, 3

    def encode(self, pixels: Tensor) -> Latents:
        return Latents(pixels.float(), torch.zeros_like(pixels, dtype=torch.float32))

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float()
