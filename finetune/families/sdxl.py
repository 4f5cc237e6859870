"""Stable Diffusion XL: two text encoders joined, a pooled embedding, and the picture's sizes as conditions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from torch import Tensor

from finetune.batch import Geometry
from finetune.families.sd import DiffusersFamily


class StableDiffusionXL(DiffusersFamily):
    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    export_prefix: ClassVar = {"denoiser": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    sources: ClassVar = {
        "denoiser": ("unet", diffusers.UNet2DConditionModel),
        "vae": ("vae", diffusers.AutoencoderKL),
        "text_encoder": ("text_encoder", transformers.CLIPTextModel),
        "text_encoder_2": ("text_encoder_2", transformers.CLIPTextModelWithProjection),
    }

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        super().__init__(folder, dtype)
        encoder: Any = self.parts["text_encoder"]
        last = encoder.config.num_hidden_layers - 1
        names = {name for name, _ in encoder.named_modules()}
        wrapper = "text_model." if "text_model" in names else ""
        # the UNet reads the second-last layer: nothing after it gets a gradient, and DDP fails on such weights
        self.unread = {"text_encoder": (f"{wrapper}encoder.layers.{last}.", f"{wrapper}final_layer_norm")}

    @classmethod
    def matches(cls, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        return model_index.get("_class_name") == cls.pipeline_class and denoiser_config.get("in_channels") == 4

    @classmethod
    def write_tiny(cls, folder: Path, seed: int = 0) -> None:
        from finetune.families.tiny import write_sdxl

        write_sdxl(folder, seed)

    def _part_dtype(self, name: str) -> torch.dtype:
        """SDXL's VAE overflows in fp16 (black pictures): it stays in fp32 then."""
        return torch.float32 if name == "vae" and self.dtype == torch.float16 else self.dtype

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden": [B, length, w1 + w2], "pooled": [B, w]}: second-last layers joined; the second's pooled."""
        hidden, pooled = [], None
        for index, name in enumerate(self.text_encoders):
            encoder: Any = self.parts[name]
            ids = self.tokenize(index, prompts).to(encoder.device)
            out = encoder(ids, output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
            pooled = out[0]
        assert pooled is not None
        return {"hidden": torch.cat(hidden, dim=-1), "pooled": pooled}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, cond: dict[str, Tensor], geometry: Sequence[Geometry]
    ) -> Tensor:
        denoiser: Any = self.parts["denoiser"]
        dtype = denoiser.conv_in.weight.dtype
        added = {"text_embeds": cond["pooled"].to(dtype), "time_ids": time_ids(geometry).to(noisy.device, dtype)}
        return denoiser(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=cond["hidden"].to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def _pipeline_parts(self, scheduler: Any) -> dict[str, Any]:
        return {
            "vae": self.parts["vae"],
            "text_encoder": self.parts["text_encoder"],
            "text_encoder_2": self.parts["text_encoder_2"],
            "tokenizer": self.tokenizers[0],
            "tokenizer_2": self.tokenizers[1],
            "unet": self.parts["denoiser"],
            "scheduler": scheduler,
            "add_watermarker": False,
        }


def time_ids(geometry: Sequence[Geometry]) -> Tensor:
    """[B, 6]: original height and width, crop top and left, target height and width (arXiv:2307.01952 section 2.2)."""
    return torch.tensor([[*item.original, *item.crop, *item.target] for item in geometry], dtype=torch.float32)
