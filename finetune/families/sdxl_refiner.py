"""The SDXL refiner: a second UNet, with one text encoder, to finish what SDXL began (arXiv:2307.01952 section 2.5).

It draws from pictures: the noise levels it was trained on are the lowest 200 of 1000. In place of the target size it
reads an aesthetic score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from torch import Tensor

from finetune.core.batch import Geometry
from finetune.families.base import ImageCondition, Labels
from finetune.families.sdxl import StableDiffusionXL

SCORE = 6.0  # diffusers' default for what is wanted; 2.5 goes with the negative prompt
STRENGTH = 0.3  # the share of the noise that a given picture gets: diffusers' default


class StableDiffusionXLRefiner(StableDiffusionXL):
    name = "sdxl-refiner"
    pipeline_class = "StableDiffusionXLImg2ImgPipeline"
    pipelines: ClassVar = {"": pipeline_class}
    timestep_fraction = 0.2
    known_to_uis = False
    export_prefix: ClassVar = {"denoiser": "lora_unet", "text_encoder_2": "lora_te2"}
    sources: ClassVar = {
        "denoiser": ("unet", diffusers.UNet2DConditionModel),
        "vae": ("vae", diffusers.AutoencoderKL),
        "text_encoder_2": ("text_encoder_2", transformers.CLIPTextModelWithProjection),
    }
    labels = Labels(
        "sdxl_refiner_v1-0",
        "stable-diffusion-xl-v1-refiner",
        "https://github.com/Stability-AI/generative-models",
        "SDXL",
    )

    def _time_ids(self, geometry: Sequence[Geometry]) -> Tensor:
        """[B, 5]: original height and width, crop top and left, aesthetic score."""
        return torch.tensor([[*item.original, *item.crop, SCORE] for item in geometry], dtype=torch.float32)

    def pipeline_inputs(self, side: int, count: int, steps: int, given: ImageCondition | None) -> dict[str, Any]:
        """A given picture is refined. Without one everything is drawn, from the noise over latents of zeros."""
        if given is None:
            latents = side // self.latent_factor
            return {"image": torch.zeros(count, self.latent_channels, latents, latents), "strength": 1.0}
        return {"image": given.image.expand(count, -1, -1, -1), "strength": max(STRENGTH, 1 / steps)}

    def _pipeline_extras(self) -> dict[str, Any]:
        left_out = {"text_encoder": None, "tokenizer": None}
        return super()._pipeline_extras() | left_out | {"requires_aesthetics_score": True}
