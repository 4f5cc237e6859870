"""Flux.1: a transformer over packed latents on a rectified flow; CLIP's pooled vector and T5's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import diffusers
import torch
import transformers
from torch import Tensor

from finetune.core.batch import Geometry
from finetune.core.devices import sent
from finetune.core.errors import BadInput
from finetune.families.drawing import DiffusersDrawing
from finetune.families.naming.base import Labels
from finetune.families.naming.mmdit import FLUX_NAMES, FLUX_READERS, JoinedNaming
from finetune.families.parts import PartSource
from finetune.families.transformer import TransformerFamily

# [dev] reads its guidance scale as an input; for training on photos, which no guidance has changed, it is 1
TRAINING_GUIDANCE = 1.0


def _architecture(config: Mapping[str, Any]) -> str:
    """[schnell] differs from [dev] only in that it does not read a guidance scale."""
    return "flux-1-dev" if config.get("guidance_embeds") else "flux-1-schnell"


class FluxDrawing(DiffusersDrawing):
    def arguments(self, guidance: float, negatives: Sequence[str]) -> dict[str, Any]:
        """A distilled model reads the guidance scale as an input; only other models use negative prompts."""
        return {"guidance_scale": guidance, "max_sequence_length": self.family.text_length(1)}


class Flux(TransformerFamily):
    name = "flux"
    pipeline_class = "FluxPipeline"
    drawing_class = FluxDrawing
    sources: ClassVar = {
        "denoiser": PartSource("transformer", diffusers.FluxTransformer2DModel),
        "vae": PartSource("vae", diffusers.AutoencoderKL),
        "text_encoder": PartSource("text_encoder", transformers.CLIPTextModel),
        "text_encoder_2": PartSource("text_encoder_2", transformers.T5EncoderModel),
    }
    naming = JoinedNaming(
        Labels(
            "flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux", "Flux", prediction="",
            network="networks.lora_flux",
        ),
        {"denoiser": "lora_unet", "text_encoder": "lora_te1"},
        FLUX_READERS,
        names=FLUX_NAMES,
        architecture_of=_architecture,
    )  # fmt: skip
    t5_length = 512

    @classmethod
    def matches(cls, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        return model_index.get("_class_name") == cls.pipeline_class

    @classmethod
    def resolution_of(cls, folder: Path) -> int:
        """The VAE's resolution: the transformer's config has none."""
        return int(diffusers.AutoencoderKL.load_config(folder / "vae").get("sample_size", 1024))

    def _check_widths(self) -> None:
        config = cast(Any, self.parts["denoiser"]).config
        clip, t5 = (cast(Any, self.parts[name]).config.hidden_size for name in self.text_encoders)
        if (clip, t5) != (config.pooled_projection_dim, config.joint_attention_dim):
            raise BadInput(
                f"in {self.folder} the transformer reads text of widths {config.pooled_projection_dim} and "
                f"{config.joint_attention_dim} but the text encoders return {clip} and {t5}: they belong to different "
                "bases, use parts of one base"
            )

    def encode_text(self, index: int, prompts: Sequence[str]) -> dict[str, Tensor]:
        """CLIP: {"pooled": [B, width]}; T5: {"t5": [B, length, width]}."""
        if index == 1:
            return self._encode_t5(index, prompts)
        encoder: Any = self.parts["text_encoder"]
        return {"pooled": encoder(sent(self.tokenize(0, prompts), encoder.device)).pooler_output}

    def _join(self, encoded: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"hidden": encoded[1]["t5"], "pooled": encoded[0]["pooled"]}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, cond: dict[str, Tensor], geometry: Sequence[Geometry]
    ) -> Tensor:
        denoiser: Any = self.parts["denoiser"]
        dtype = denoiser.proj_out.weight.dtype
        height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        guidance = torch.full((len(noisy),), TRAINING_GUIDANCE, device=noisy.device)
        packed = denoiser(
            hidden_states=pack_latents(noisy).to(dtype),
            timestep=timesteps / self.schedule.steps,
            guidance=guidance if denoiser.config.guidance_embeds else None,
            encoder_hidden_states=cond["hidden"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            txt_ids=torch.zeros(cond["hidden"].shape[1], 3, device=noisy.device, dtype=dtype),
            img_ids=image_ids(height, width, noisy.device).to(dtype),
            return_dict=False,
        )[0]
        return unpack_latents(packed, height, width)


def pack_latents(latents: Tensor) -> Tensor:
    """[B, C, 2h, 2w] -> [B, h w, 4 C]: each 2x2 patch becomes one token."""
    patches = latents.unfold(2, 2, 2).unfold(3, 2, 2)  # [B, C, h, w, 2, 2]
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for h = `height` and w = `width`."""
    patches: Tensor = tokens.unflatten(1, (height, width)).unflatten(3, (-1, 2, 2))  # [B, h, w, C, 2, 2]
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def image_ids(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """[h w, 3]: a zero, the row and the column of each token, for the rotary position embedding."""
    sides = (torch.arange(height, device=device), torch.arange(width, device=device))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()
