"""DeepFloyd IF's first stage (arXiv:2205.11487), for finetune: a UNet on pixels, with T5's tokens as its condition.

It has no VAE and no CLIP, and its denoiser also predicts a variance. Stages II and III, which enlarge the image, are
not included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import diffusers
import transformers
from torch import Tensor

from finetune.core.batch import Geometry
from finetune.core.errors import BadInput
from finetune.families.codec import ImageCodec, PixelCodec
from finetune.families.configs import read_config
from finetune.families.naming.base import Labels, Naming, Readers
from finetune.families.parts import PartSource
from finetune.families.unet import UNetDrawing, UNetFamily

LENGTH = 77  # tokens: the number with which IF was trained


class DeepFloydDrawing(UNetDrawing):
    def arguments(self, guidance: float, negatives: Sequence[str]) -> dict[str, Any]:
        return super().arguments(guidance, negatives) | {"clean_caption": False}

    def extras(self) -> dict[str, Any]:
        unused = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
        return unused | {"requires_safety_checker": False}


class DeepFloydIF(UNetFamily):
    name = "deepfloyd-if"
    pipeline_class = "IFPipeline"
    pipelines: ClassVar = {"": pipeline_class}
    drawing_class = DeepFloydDrawing
    sources: ClassVar = {
        "denoiser": PartSource("unet", diffusers.UNet2DConditionModel),
        "text_encoder": PartSource("text_encoder", transformers.T5EncoderModel),
    }
    naming = Naming(
        Labels("deepfloyd_if_i", "deepfloyd-if-stage-i", "https://github.com/deep-floyd/IF", "Unknown"),
        {"denoiser": "lora_unet"},
        Readers(),  # diffusers reads its own form; its reader of kohya's does not know add_k_proj and add_v_proj
        ui_format="diffusers",
    )

    @classmethod
    def matches(cls, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        return model_index.get("_class_name") == cls.pipeline_class

    @classmethod
    def resolution_of(cls, folder: Path) -> int:
        return int(read_config(folder, "unet/config.json").get("sample_size", 64))

    def _codec(self) -> ImageCodec:
        return PixelCodec()

    def _check_widths(self) -> None:
        reads = int(cast(Any, self.parts["denoiser"]).config.encoder_hid_dim)
        writes = int(cast(Any, self.parts["text_encoder"]).config.d_model)
        if reads != writes:
            raise BadInput(
                f"in {self.folder} the unet reads text of width {reads} but the text encoder returns {writes}: they "
                "belong to different bases, use parts of one base"
            )

    def text_length(self, index: int) -> int:
        return LENGTH

    def encode_text(self, index: int, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden": [B, 77, width]}. The prompts are in lower case, as in the pipeline."""
        encoder: Any = self.parts["text_encoder"]
        ids = self.tokenize(index, [prompt.lower().strip() for prompt in prompts]).to(encoder.device)
        padding = cast(Any, encoder.config).pad_token_id
        return {"hidden": encoder(ids, attention_mask=(ids != padding).long())[0]}

    def _join(self, encoded: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return encoded[0]

    def predict(
        self, noisy: Tensor, timesteps: Tensor, cond: dict[str, Tensor], geometry: Sequence[Geometry]
    ) -> Tensor:
        """The predicted noise. The second half of the channels, the variance, is only for samplers."""
        denoiser: Any = self.parts["denoiser"]
        read = noisy.to(denoiser.conv_in.weight.dtype)
        text = cond["hidden"].to(read.dtype)
        both: Tensor = denoiser(read, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        return both[:, : noisy.shape[1]]
