"""Stable Diffusion XL: two text encoders, a pooled embedding, and the image sizes as conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from torch import Tensor

from finetune.core.batch import Geometry
from finetune.core.devices import sent
from finetune.families.configs import read_config
from finetune.families.naming.base import Labels, SingleFile
from finetune.families.naming.ldm import SDXL_READERS, UNetNaming
from finetune.families.parts import PartSource
from finetune.families.unet import UNetDrawing, UNetFamily


class SDXLDrawing(UNetDrawing):
    def arguments(self, guidance: float, negatives: Sequence[str]) -> dict[str, Any]:
        """Without negative prompts the pipeline takes what the base wants in their place: zeros, or the empty prompt's
        embedding."""
        given = super().arguments(guidance, negatives)
        return given if any(negatives) else given | {"negative_prompt": None}

    def particulars(self, negative: str) -> dict[str, Any]:
        zeros = {"empty_negative": "zeros"} if not negative and self._zeros() else {}
        return super().particulars(negative) | zeros

    def extras(self) -> dict[str, Any]:
        return {"add_watermarker": False, "force_zeros_for_empty_prompt": self._zeros()}

    def _zeros(self) -> bool:
        index = read_config(self.family.folder, "model_index.json")
        return bool(index.get("force_zeros_for_empty_prompt", True))  # as diffusers does


class StableDiffusionXL(UNetFamily):
    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    pipelines: ClassVar = {
        "": pipeline_class,
        "inpaint": "StableDiffusionXLInpaintPipeline",
        "edit": "StableDiffusionXLInstructPix2PixPipeline",
    }
    drawing_class = SDXLDrawing
    sources: ClassVar = {
        "denoiser": PartSource("unet", diffusers.UNet2DConditionModel),
        "vae": PartSource("vae", diffusers.AutoencoderKL, fp32_for_fp16=True),  # fp16 overflows: black images
        "text_encoder": PartSource("text_encoder", transformers.CLIPTextModel),
        "text_encoder_2": PartSource("text_encoder_2", transformers.CLIPTextModelWithProjection),
    }
    naming = UNetNaming(
        Labels(
            "sdxl_base_v1-0",
            "stable-diffusion-xl-v1-base",
            "https://github.com/Stability-AI/generative-models",
            "SDXL",
        ),
        {"denoiser": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
        SDXL_READERS,
        SingleFile(
            {
                "text_encoder": ("conditioner.embedders.0.transformer.text_model.", False),
                "text_encoder_2": ("conditioner.embedders.1.model.", True),
            },
            "stabilityai/stable-diffusion-xl-base-1.0",
            marked=True,
        ),
        original=True,
    )

    def _find_unused_parameters(self) -> dict[str, tuple[str, ...]]:
        if "text_encoder" not in self.parts:
            return {}
        encoder: Any = self.parts["text_encoder"]
        last = encoder.config.num_hidden_layers - 1
        names = {name for name, _ in encoder.named_modules()}
        wrapper = "text_model." if "text_model" in names else ""
        # the UNet reads the second-last layer, so later weights get no gradient, and DDP fails on such weights
        return {"text_encoder": (f"{wrapper}encoder.layers.{last}.", f"{wrapper}final_layer_norm")}

    def encode_text(self, index: int, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden": [B, length, width]}: the second-last layer; the second encoder's "pooled" [B, width] too."""
        encoder: Any = self.parts[self.text_encoders[index]]
        ids = sent(self.tokenize(index, prompts), encoder.device)
        out = encoder(ids, output_hidden_states=True)
        hidden = {"hidden": out.hidden_states[-2]}
        return hidden if self.text_encoders[index] == "text_encoder" else hidden | {"pooled": out[0]}

    def _join(self, encoded: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """{"hidden": [B, length, w1 + w2], "pooled": [B, w2]}."""
        return {"hidden": torch.cat([one["hidden"] for one in encoded], dim=-1), "pooled": encoded[-1]["pooled"]}

    def size_conditions(self, geometry: Sequence[Geometry]) -> dict[str, Tensor]:
        """{"time_ids": [B, 6]}, float32; the refiner's [B, 5]."""
        return {"time_ids": self._time_ids(geometry)}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, cond: dict[str, Tensor], geometry: Sequence[Geometry]
    ) -> Tensor:
        denoiser: Any = self.parts["denoiser"]
        read = self._read(noisy)
        dtype = read.dtype
        # the sizes stay fp32: bf16 would round 1365 pixels to 1368, which has another embedding
        sizes = cond if "time_ids" in cond else self.size_conditions(geometry)
        added = {"text_embeds": cond["pooled"].to(dtype), "time_ids": sizes["time_ids"].to(noisy.device)}
        predicted: Tensor = denoiser(
            read,
            timesteps,
            encoder_hidden_states=cond["hidden"].to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return predicted

    def _time_ids(self, geometry: Sequence[Geometry]) -> Tensor:
        return time_ids(geometry)


def time_ids(geometry: Sequence[Geometry]) -> Tensor:
    """[B, 6]: original height and width, crop top and left, target height and width (arXiv:2307.01952 section 2.2)."""
    return torch.tensor([[*item.original, *item.crop, *item.target] for item in geometry], dtype=torch.float32)
