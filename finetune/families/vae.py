"""A VAE that computes in another dtype than the pipeline around it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn


def fitting(vae: Any, dtype: torch.dtype, autocast: bool = False) -> Any:
    """The VAE for a pipeline in `dtype`, wrapped in `CastVAE` if needed. `autocast`: the pipeline runs under it."""
    return vae if vae.dtype == dtype and not autocast else CastVAE(vae, dtype)


class CastVAE(nn.Module):
    """Wraps the VAE `inner` for a pipeline in `dtype`. Inputs are cast to the VAE's own dtype, and latents back. It
    computes in its own dtype even under autocast: SDXL's VAE overflows in fp16.

    diffusers instead casts the VAE itself to fp32 and back (`force_upcast` in its config). That rounds its weights,
    and does not work with a VAE in fp32, to which SDXL's pipelines pass fp16 latents.
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
