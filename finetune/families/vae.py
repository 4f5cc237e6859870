"""A VAE that computes in another dtype than the pipeline round it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn


def fitting(vae: Any, dtype: torch.dtype, autocast: bool = False) -> Any:
    """The VAE for a pipeline of `dtype`, which may run under autocast."""
    return vae if vae.dtype == dtype and not autocast else CastVAE(vae, dtype)


class CastVAE(nn.Module):
    """`inner` as a pipeline of `dtype` sees it: what it is given is cast to its own dtype, latents back. It computes
    in its own dtype under autocast too: SDXL's VAE overflows in fp16.

    diffusers' own way is to cast the VAE itself there and back, by its config's `force_upcast`: that rounds its
    weights, and a VAE that is held in fp32 from the start is not foreseen (SDXL's pipelines give it fp16 latents).
    """

    def __init__(self, inner: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype
        self.config = FrozenDict({**inner.config, "force_upcast": False})

    @property
    def device(self) -> torch.device:
        device: torch.device = self.inner.device
        return device

    def encode(self, pixels: Tensor) -> AutoencoderKLOutput:
        with torch.autocast(pixels.device.type, enabled=False):
            moments = self.inner.encode(pixels.to(self.inner.dtype)).latent_dist.parameters
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments.to(self.dtype)))

    def decode(self, latents: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return self.inner.decode(latents.to(self.inner.dtype), return_dict=return_dict)
