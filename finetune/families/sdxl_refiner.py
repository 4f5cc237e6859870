"""The SDXL refiner: a UNet with one text encoder that refines SDXL's images (arXiv:2307.01952 section 2.5).

It starts from an image: it was trained on the lowest 200 of 1000 noise levels only. Instead of the target size it
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
from finetune.families.drawing import ImageCondition, Wants
from finetune.families.naming.base import Labels
from finetune.families.naming.ldm import UNetNaming
from finetune.families.parts import PartSource
from finetune.families.sdxl import SDXLDrawing, StableDiffusionXL

SCORE = 6.0  # diffusers' default for the prompt; for the negative prompt it is 2.5
STRENGTH = 0.3  # the share of the noise that is added to a given image: diffusers' default


class RefinerDrawing(SDXLDrawing):
    def inputs(self, side: int, count: int, steps: int, given: ImageCondition | None) -> dict[str, Any]:
        """Refines a given image. Without one, it starts from full noise on latents of zeros."""
        if given is None:
            codec = self.family.codec
            latents = side // codec.factor
            return {"image": torch.zeros(count, codec.channels, latents, latents), "strength": 1.0}
        strength = max(STRENGTH, 1 / steps) if given.strength is None else given.strength
        return {"image": given.image.expand(count, -1, -1, -1), "strength": strength}

    @property
    def wants(self) -> Wants:
        return Wants((), ("image", "strength"))

    def extras(self) -> dict[str, Any]:
        left_out = {"text_encoder": None, "tokenizer": None}
        return super().extras() | left_out | {"requires_aesthetics_score": True}


class StableDiffusionXLRefiner(StableDiffusionXL):
    name = "sdxl-refiner"
    pipeline_class = "StableDiffusionXLImg2ImgPipeline"
    pipelines: ClassVar = {"": pipeline_class}
    timestep_fraction = 0.2
    drawing_class = RefinerDrawing
    sources: ClassVar = {
        "denoiser": PartSource("unet", diffusers.UNet2DConditionModel),
        "vae": PartSource("vae", diffusers.AutoencoderKL, fp32_for_fp16=True),
        "text_encoder_2": PartSource("text_encoder_2", transformers.CLIPTextModelWithProjection),
    }
    naming = UNetNaming(
        Labels(
            "sdxl_refiner_v1-0",
            "stable-diffusion-xl-v1-refiner",
            "https://github.com/Stability-AI/generative-models",
            "SDXL",
        ),
        {"denoiser": "lora_unet", "text_encoder_2": "lora_te2"},
        readers=None,
    )  # diffusers' names: diffusers fails on the original ones, whose blocks have numbers above 9 here

    def _time_ids(self, geometry: Sequence[Geometry]) -> Tensor:
        """[B, 5]: original height and width, crop top and left, aesthetic score."""
        return torch.tensor([[*item.original, *item.crop, SCORE] for item in geometry], dtype=torch.float32)
