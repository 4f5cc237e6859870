"""Small random networks of the true classes, written to folders as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from finetune.testing.tiny_unets import tiny_text_config, tiny_tokenizer

SIDE = 32
VIT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": SIDE, "patch_size": 8,
}  # fmt: skip
SQUARE = {"do_resize": True, "do_normalize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 2}
CROPPED = {
    "do_resize": True, "do_normalize": True, "do_center_crop": True, "size": {"shortest_edge": 36},
    "crop_size": {"height": SIDE, "width": SIDE}, "resample": 3,
}  # fmt: skip


def write_dino(folder: Path) -> Path:
    torch.manual_seed(1)
    transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False).save_pretrained(folder)
    return _prepared(folder, SQUARE)


def write_dinov2(folder: Path) -> Path:
    torch.manual_seed(2)
    transformers.Dinov2Model(transformers.Dinov2Config(**{**VIT, "patch_size": 4})).save_pretrained(folder)
    return _prepared(folder, CROPPED)


def write_dinov3(folder: Path) -> Path:
    torch.manual_seed(3)
    transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VIT)).save_pretrained(folder)
    return _prepared(folder, SQUARE)


def write_clip(folder: Path) -> Path:
    torch.manual_seed(4)
    tokenizer = tiny_tokenizer(folder)
    vision = transformers.CLIPVisionConfig(**VIT, projection_dim=16)
    text = tiny_text_config(tokenizer, 16)
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    values = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    return _prepared(folder, CROPPED | values)


def write_chain(layers: nn.Sequential, file: Path, **further: torch.Tensor) -> Path:
    """The weights of VGG-19 or AlexNet, under torchvision's names."""
    torch.manual_seed(5)
    weights = {}
    for number, layer in enumerate(layers):
        for name, value in layer.state_dict().items():
            spread = 1.4 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.0
            weights[f"features.{number}.{name}"] = torch.randn(value.shape) * spread
    save_file(weights | further, file)
    return file


def _prepared(folder: Path, values: dict[str, Any]) -> Path:
    normal = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normal | values), encoding="utf-8")
    return folder
