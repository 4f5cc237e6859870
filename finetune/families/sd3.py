"""Stable Diffusion 3 and 3.5: a multimodal transformer on a rectified flow (arXiv:2403.03206), three text encoders.

T5 may be absent. Its tokens are then zeros, which the model has seen in training.
"""

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
from finetune.families.naming.mmdit import SD3_NAMES, SD3_READERS, JoinedNaming
from finetune.families.parts import PartSource
from finetune.families.transformer import TransformerFamily

T5 = "text_encoder_3"


def _architecture(config: Mapping[str, Any]) -> str:
    """3.5 normalises queries and keys; 3.5 medium also has a second attention."""
    if not config.get("qk_norm"):
        return "stable-diffusion-3-medium"
    return f"stable-diffusion-3-5-{'medium' if config.get('dual_attention_layers') else 'large'}"


class SD3Drawing(DiffusersDrawing):
    def arguments(self, guidance: float, negatives: Sequence[str]) -> dict[str, Any]:
        assert isinstance(self.family, StableDiffusion3)
        length = self.family.text_length(2) if T5 in self.family.parts else self.family.t5_length
        return super().arguments(guidance, negatives) | {"max_sequence_length": length}


class StableDiffusion3(TransformerFamily):
    name = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    drawing_class = SD3Drawing
    sources: ClassVar = {
        "denoiser": PartSource("transformer", diffusers.SD3Transformer2DModel),
        "vae": PartSource("vae", diffusers.AutoencoderKL),
        "text_encoder": PartSource("text_encoder", transformers.CLIPTextModelWithProjection),
        "text_encoder_2": PartSource("text_encoder_2", transformers.CLIPTextModelWithProjection),
        T5: PartSource(T5, transformers.T5EncoderModel, optional=True),
    }
    naming = JoinedNaming(
        Labels(
            "sd3", "stable-diffusion-3", "https://github.com/Stability-AI/sd3-ref", "SD3", prediction="",
            network="networks.lora_sd3",
        ),
        {"denoiser": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
        SD3_READERS,
        names=SD3_NAMES,
        architecture_of=_architecture,
    )  # fmt: skip

    def _find_unused_parameters(self) -> dict[str, tuple[str, ...]]:
        last = f"transformer_blocks.{cast(Any, self.parts['denoiser']).config.num_layers - 1}.attn"
        # the last block drops its text tokens, so nothing reads their queries
        return {"denoiser": (f"{last}.add_q_proj", f"{last}.norm_added_q")}

    @classmethod
    def matches(cls, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        return model_index.get("_class_name") == cls.pipeline_class and denoiser_config.get("in_channels") == 16

    @classmethod
    def resolution_of(cls, folder: Path) -> int:
        config = diffusers.SD3Transformer2DModel.load_config(folder / "transformer")
        vae = diffusers.AutoencoderKL.load_config(folder / "vae")
        pixels: int = int(config.get("sample_size", 128)) * 2 ** (len(vae["block_out_channels"]) - 1)
        return pixels

    def _check_widths(self) -> None:
        """Checks that T5's width is the denoiser's, and that CLIP's two widths together, which are padded, fit in
        it."""
        clip = [cast(Any, self.parts[name]).config.hidden_size for name in ("text_encoder", "text_encoder_2")]
        t5 = [cast(Any, self.parts[T5]).config.d_model] if T5 in self.parts else []
        if sum(clip) > self.hidden_width or any(width != self.hidden_width for width in t5):
            raise BadInput(
                f"in {self.folder} the transformer reads text of width {self.hidden_width} but the text encoders "
                f"return {' + '.join(map(str, clip))} and {t5 or 'nothing'}: they belong to different bases, use "
                "parts "
                "of one base"
            )

    def encode_text(self, index: int, prompts: Sequence[str]) -> dict[str, Tensor]:
        """CLIP: {"hidden": second-last layer, "pooled": its projection}; T5: {"t5": last layer}."""
        if self.text_encoders[index] == T5:
            return self._encode_t5(index, prompts)
        encoder: Any = self.parts[self.text_encoders[index]]
        out = encoder(sent(self.tokenize(index, prompts), encoder.device), output_hidden_states=True)
        return {"hidden": out.hidden_states[-2], "pooled": out[0]}

    def _join(self, encoded: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """{"hidden": [B, CLIP's length + T5's, width], "pooled": [B, w1 + w2]}."""
        clip = torch.cat([one["hidden"] for one in encoded[:2]], dim=-1)
        clip = torch.nn.functional.pad(clip, (0, self.hidden_width - clip.shape[-1]))
        t5 = encoded[2]["t5"] if len(encoded) == 3 else clip.new_zeros(len(clip), self.t5_length, clip.shape[-1])
        pooled = torch.cat([one["pooled"] for one in encoded[:2]], dim=-1)
        return {"hidden": torch.cat([clip, t5], dim=-2), "pooled": pooled}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, cond: dict[str, Tensor], geometry: Sequence[Geometry]
    ) -> Tensor:
        denoiser: Any = self.parts["denoiser"]
        dtype = denoiser.proj_out.weight.dtype
        predicted: Tensor = denoiser(
            hidden_states=noisy.to(dtype),
            timestep=timesteps,
            encoder_hidden_states=cond["hidden"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return predicted
