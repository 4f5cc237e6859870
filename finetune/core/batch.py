"""The data of one training step. Every module may import this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from finetune.core.rng import SampleKey, normal

Role = Literal["photo", "class", "other"]  # a photo of the subject, a class image, an image of everything else


@dataclass(frozen=True)
class Latents:
    """Scaled VAE latents as a distribution, so that every step can sample them anew from a cache.

    `mean` and `std` have shape [B, C, h, w] and are already multiplied by the family's scaling factor.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Returns mean + std * noise; all have shape [B, C, h, w]."""
        return self.mean + self.std * noise

    def to(self, device: torch.device | str) -> Latents:
        """Returns a copy on `device`."""
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

    `weight` [B] multiplies each sample's loss. `keys` gives each sample's position in the run. `names` are the files
    that the samples come from, for error messages. `mask` [B, 1, h, w] in [0, 1] is the weight of each latent in its
    sample's loss; None if all count equally. `extra` [B, E, h, w] holds further input channels for denoisers that read
    more than noisy latents (`data/conditioning/`). `conditions` [B, ...] are computed from the images
    (`Family.encode_image_conditions`). `roles` say what each sample is for; empty if all are photos.
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
    roles: list[Role] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def latent_noise(self) -> Tensor:
        """Returns the noise [B, C, h, w] of `sample_latents`, on the CPU. Equal keys give equal noise."""
        return normal(self.keys, self.latents.mean.shape[1:], "vae")

    def sample_latents(self, noise: Tensor | None = None) -> Tensor:
        """Returns x0 [B, C, h, w] float32, a sample of the latent distribution. Equal keys give equal samples.

        `noise`: `latent_noise` on the latents' device, if it is there already.
        """
        drawn = self.latent_noise().to(self.latents.mean.device) if noise is None else noise
        return self.latents.sample(drawn).float()

    def rows_of(self, role: Role) -> list[int]:
        """Returns the indices of the samples with this role."""
        return [row for row, own in enumerate(self.roles) if own == role]

    def rows_without(self, role: Role) -> list[int]:
        """Returns the indices of the samples with another role."""
        return [row for row in range(len(self)) if not self.roles or self.roles[row] != role]

    def part(self, rows: Sequence[int]) -> Batch:
        """Returns the samples with these indices."""
        return Batch(
            latents=Latents(picked(self.latents.mean, rows), picked(self.latents.std, rows)),
            prompts=[self.prompts[row] for row in rows],
            weight=picked(self.weight, rows),
            geometry=[self.geometry[row] for row in rows],
            keys=[self.keys[row] for row in rows],
            names=[self.names[row] for row in rows],
            mask=None if self.mask is None else picked(self.mask, rows),
            extra=None if self.extra is None else picked(self.extra, rows),
            conditions={name: picked(value, rows) for name, value in self.conditions.items()},
            roles=[self.roles[row] for row in rows] if self.roles else [],
        )

    def concat_conditioning(self, noisy: Tensor) -> Tensor:
        """Returns the denoiser's input [B, C + E, h, w]: `noisy` [B, C, h, w], followed by the extra channels."""
        return noisy if self.extra is None else torch.cat([noisy, self.extra], dim=1)

    def to(self, device: torch.device | str) -> Batch:
        """Returns a copy with every tensor on `device`."""
        return replace(
            self,
            latents=self.latents.to(device),
            weight=self.weight.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            extra=None if self.extra is None else self.extra.to(device),
            conditions={name: value.to(device) for name, value in self.conditions.items()},
        )


def picked(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns the given rows of values [B, ...]. An index tensor would have to be copied to the values' device, and
    under CUDA that copy waits for all that the device has still to do."""
    return torch.stack([values[row] for row in rows]) if rows else values[:0]
