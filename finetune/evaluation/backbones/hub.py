"""DINO, DINOv2, DINOv3 and CLIP: folders that transformers reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from finetune.core.errors import BadInput
from finetune.core.reading import read_json
from finetune.evaluation.backbones.base import MEAN, STD, Backbone, Preparation
from finetune.evaluation.statistics import Vectors
from finetune.families.weights import load_weights

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"


class HubBackbone(Backbone):
    """A folder with a config, weights and a preprocessor config.

    Class attributes:
        classes: model_type of a config -> the name of the class in transformers.
        options: arguments of its constructor.
    """

    classes: ClassVar[dict[str, str]]
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, place: Path, name: str) -> None:
        kind = self._kind_of(place)
        super().__init__(place, name)
        self.preparation = preparation_of(self, place)
        try:
            self.model = load_weights(place, self._class(kind), torch.float32, **self.options)
        except BadInput as fault:
            raise BadInput(
                f"{self.option().split()[0]}: {str(fault).replace('fetch the base', 'fetch it')}"
            ) from fault
        self.model.eval().requires_grad_(False)

    def _kind_of(self, place: Path) -> str:
        self.place = place
        if place.is_file():
            raise self.refuse("it is a file")
        if not (place / CONFIG).is_file():
            raise self.refuse(f"it has no {CONFIG}")
        kind = str(read_json(place / CONFIG, dict).get("model_type", ""))
        if kind not in self.classes:
            raise self.refuse(f"its {CONFIG} has model_type {kind!r}, and not {' or '.join(self.classes)}")
        return kind

    def _class(self, kind: str) -> Any:
        import transformers

        return getattr(transformers, self.classes[kind])


class ClassToken:
    """What a network sees is the class token of its vision transformer's last layer, after its norm.

    It is no `Backbone` itself, so that the registry does not take it for one.
    """

    model: Any

    def look(self, images: Tensor) -> Tensor:
        """[n, 3, height, width] -> [n, width]."""
        token: Tensor = self.model(pixel_values=images).last_hidden_state[:, 0]
        return token


class DinoNetwork(ClassToken, HubBackbone):
    """DINO: a ViT that was trained without labels (arXiv:2104.14294)."""

    kind = "dino"
    hub = "facebook/dino-vits16"
    wants = "a folder of DINO ViT-S/16 for transformers (hub id facebook/dino-vits16)"
    classes = {"vit": "ViTModel"}
    options = {"add_pooling_layer": False}  # DINO's weights have none


class DinoV2Network(ClassToken, HubBackbone):
    """DINOv2 (arXiv:2304.07193), with or without registers."""

    kind = "dinov2"
    hub = "facebook/dinov2-base"
    wants = "a folder of DINOv2 for transformers (hub id facebook/dinov2-base)"
    classes = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}


class DinoV3Network(ClassToken, HubBackbone):
    """DINOv3 (arXiv:2508.10104)."""

    kind = "dinov3"
    hub = "facebook/dinov3-vits16-pretrain-lvd1689m"
    wants = "a folder of DINOv3 for transformers (hub id facebook/dinov3-vits16-pretrain-lvd1689m, after its licence)"
    classes = {"dinov3_vit": "DINOv3ViTModel"}


class ClipNetwork(HubBackbone):
    """CLIP's embeddings of images and texts, in their common space."""

    kind = "clip"
    hub = "openai/clip-vit-base-patch32"
    wants = "a folder of CLIP for transformers (hub id openai/clip-vit-base-patch32)"
    classes = {"clip": "CLIPModel"}
    reads_text = True

    def __init__(self, place: Path, name: str) -> None:
        super().__init__(place, name)
        from transformers import CLIPTokenizer

        try:
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(place)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self.refuse(f"it has no tokenizer that can be read: {' '.join(str(error).split())[:100]}") from error
        one, other = (self.tokenizer(text)["input_ids"] for text in ("a photo of a dog", "a photo of a cat"))
        if one == other:  # transformers makes an empty tokenizer of a folder without one, which reads every text alike
            raise self.refuse("it has no tokenizer that can be read: every word is unknown to it")
        self.length = int(self.model.config.text_config.max_position_embeddings)

    def look(self, images: Tensor) -> Tensor:
        pooled = self.model.vision_model(pixel_values=images).pooler_output
        found: Tensor = self.model.visual_projection(pooled)
        return found

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Vectors:
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": self.length}
        tokens = self.tokenizer(list(texts), return_tensors="pt", **options)
        inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        found = self.model.text_projection(self.model.text_model(**inputs).pooler_output)
        values: Vectors = found.double().cpu().numpy()
        return self.finite(values)

    def cut(self, texts: Sequence[str]) -> list[str]:
        return [text for text in texts if len(self.tokenizer(text)["input_ids"]) > self.length]


def preparation_of(backbone: Backbone, folder: Path) -> Preparation:
    """Reads preprocessor_config.json, of today's form or with whole numbers for sizes, as older ones have it."""
    file = folder / PREPROCESSOR
    if not file.is_file():
        raise backbone.refuse(f"it has no {PREPROCESSOR}")
    values = read_json(file, dict)
    try:
        crops = bool(values.get("do_center_crop"))
        crop = _sides(values["crop_size"]) if crops else None
        size = values["size"]
        if isinstance(size, int):
            wanted: int | tuple[int, int] = size if crops else (size, size)
        else:
            wanted = int(size["shortest_edge"]) if "shortest_edge" in size else _sides(size)
        mean, std = (
            tuple(map(float, values.get(name, other))) for name, other in (("image_mean", MEAN), ("image_std", STD))
        )
        prepared = Preparation(wanted, crop, Image.Resampling(values.get("resample", 2)), mean, std)
    except (KeyError, TypeError, ValueError) as error:
        raise backbone.refuse(f"its {PREPROCESSOR} can't be read: {error}") from error
    if len(mean) != 3 or len(std) != 3 or 0 in std or not _plausible(prepared):
        raise backbone.refuse(f"its {PREPROCESSOR} makes no image of three channels")
    return prepared


def _sides(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value["height"]), int(value["width"]))


def _plausible(prepared: Preparation) -> bool:
    """Sides from 8 to 2048 pixels, and a crop inside of what is resized."""
    size = prepared.size if isinstance(prepared.size, tuple) else (prepared.size, prepared.size)
    crop = prepared.crop or size
    return all(8 <= inner <= outer <= 2048 for inner, outer in zip(crop, size, strict=True))
