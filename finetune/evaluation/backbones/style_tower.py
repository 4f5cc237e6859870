"""Contrastive style descriptors (CSD, arXiv:2404.01292): a CLIP vision tower with a projection of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.evaluation.backbones.base import Backbone, Preparation, read_weights, weight_files

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
HEAD = 64  # the width of one attention head in OpenAI's vision transformers
WHOLE = {  # OpenAI's names -> transformers'
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    **{f"ln_pre.{part}": f"pre_layrnorm.{part}" for part in ("weight", "bias")},
    **{f"ln_post.{part}": f"post_layernorm.{part}" for part in ("weight", "bias")},
}
INNER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")


class CsdNetwork(Backbone):
    """Unit vectors of the style. The file is the published one: OpenAI's names under `backbone.`."""

    kind = "csd"
    wants = "CSD's published weights (pytorch_model.bin of tomg-group-umd/CSD-ViT-L, or the same as .safetensors)"

    def __init__(self, place: Path, name: str) -> None:
        super().__init__(place, name)
        weights = self._weights(place)
        try:
            self.style = weights.pop("last_layer_style").float()
            self.model = vision_tower({k[9:]: v for k, v in weights.items() if k.startswith("backbone.")})
        except (KeyError, RuntimeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
            raise self.refuse(f"it does not hold CSD's weights: {' '.join(str(error).split())[:120]}") from error
        side = self.model.config.image_size
        self.preparation = Preparation(side, (side, side), mean=MEAN, std=STD)

    def _weights(self, place: Path) -> dict[str, Any]:
        files = weight_files(place)
        if len(files) != 1:
            raise self.refuse(f"it holds {len(files)} weight files")
        values = read_weights(files[0])
        inner = values.get("model_state_dict", values)
        return {str(name).removeprefix("module."): value for name, value in dict(inner).items()}

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.style = self.style.to(device)

    def look(self, images: Tensor) -> Tensor:
        found = self.model(pixel_values=images).pooler_output @ self.style
        return torch.nn.functional.normalize(found, dim=1)


def vision_tower(weights: dict[str, Tensor]) -> Any:
    """OpenAI's vision transformer as transformers' CLIPVisionModel, in fp32; the sizes are read from the weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    width, _, patch, _ = weights["conv1.weight"].shape
    places = len(weights["positional_embedding"]) - 1
    blocks = 1 + max(int(found[1]) for name in weights if (found := BLOCK.match(name)))
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=len(weights["transformer.resblocks.0.mlp.c_fc.weight"]),
        num_hidden_layers=blocks, num_attention_heads=width // HEAD, patch_size=patch,
        image_size=patch * round(places**0.5), hidden_act="quick_gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    model = CLIPVisionModel(config).eval().requires_grad_(False)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    model.load_state_dict({prefix + name: value.float() for name, value in renamed(weights).items()}, strict=True)
    return model


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names -> transformers'; the joint projection of queries, keys and values is split."""
    found = {WHOLE[name]: value for name, value in weights.items() if name in WHOLE}
    for name, value in weights.items():
        block = BLOCK.match(name)
        if block is None:
            continue
        place, inner = f"encoder.layers.{block[1]}", block[2]
        if inner.startswith("attn.in_proj_"):
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                found[f"{place}.self_attn.{part}_proj.{inner.removeprefix('attn.in_proj_')}"] = piece
        else:
            module, _, part = inner.rpartition(".")
            found[f"{place}.{INNER[module]}.{part}"] = value
    return found
