"""What one step learns from. Every module may import this one; it imports no other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from finetune.core.rng import SampleKey, normal


@dataclass(frozen=True)
class Latents:
    """Scaled VAE latents as a distribution, so that the sampling noise stays fresh when they are cached.

    `mean` and `std` have shape [B, C, h, w] and are already multiplied by the family's scaling factor.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def to(self, device: torch.device | str) -> Latents:
        return Latents(self.mean.to(device), self.std.to(device))


@dataclass(frozen=True)
class Geometry:
    """How a photo became a training image, in pixels (SDXL's time ids, arXiv:2307.01952 section 2.2).

    `original` is (height, width) after the EXIF rotation, `crop` the (top, left) corner of the crop in the
    resized photo, `target` the (height, width) of the training image.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """B samples of one micro-batch.

    `weight` [B] multiplies each sample's loss; `keys` says where each sample stands in the run, and `names`
    which files they come from, for the message of a step that is stopped. `mask` [B, 1, h, w] in [0, 1] says how much
    each latent counts in its sample's loss; None where all count the same. `extra` [B, E, h, w] is what the denoiser
    reads behind the noisy latents, where it reads more (`data/conditioning/`). `conditions` [B, ...] are made of the
    images themselves (`Family.encode_image_conditions`).
    """

    latents: Latents
    prompts: list[str]
    weight: Tensor
    geometry: list[Geometry]
    keys: list[SampleKey]
    names: list[str]
    mask: Tensor | None = None
    extra: Tensor | None = None
    conditions: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def sample_latents(self) -> Tensor:
        """x0 [B, C, h, w] float32: a fresh sample of the latent distribution, the same one for the same key."""
        shape = self.latents.mean.shape[1:]
        noise = normal(self.keys, shape, "vae").to(self.latents.mean.device)
        return self.latents.sample(noise).float()

    def concat_conditioning(self, noisy: Tensor) -> Tensor:
        """What the denoiser reads: the noisy latents, and behind them the extra inputs."""
        return noisy if self.extra is None else torch.cat([noisy, self.extra], dim=1)

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            latents=self.latents.to(device),
            weight=self.weight.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            extra=None if self.extra is None else self.extra.to(device),
            conditions={name: value.to(device) for name, value in self.conditions.items()},
        )
