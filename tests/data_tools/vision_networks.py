"""Small random detectors and segmenters of the true classes, written to folders as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from finetune.testing.tiny_unets import LENGTH, tiny_text_config, tiny_tokenizer

SIDE = 32
NAMES = {0: "dog", 1: "face"}


def _names(names: dict[int, str]) -> dict[str, Any]:
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def _prepared(folder: Path, kind: str, **further: Any) -> Path:
    values = {"image_processor_type": kind, "size": {"height": SIDE, "width": SIDE}, "do_resize": True}
    values |= {"do_normalize": True, "do_rescale": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values | further), encoding="utf-8")
    return folder


def write_yolos(folder: Path, box: tuple[float, float, float, float]) -> Path:
    """A detector that sees a dog at `box` (centre x and y, width, height, as shares) in every photo."""
    torch.manual_seed(1)
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[SIDE, SIDE],
        patch_size=8, num_detection_tokens=3, **_names(NAMES),
    )  # fmt: skip
    model = transformers.YolosForObjectDetection(config)
    with torch.no_grad():
        model.class_labels_classifier.layers[-1].bias.copy_(torch.tensor([9.0, -9.0, -9.0]))
        model.bbox_predictor.layers[-1].weight.zero_()
        model.bbox_predictor.layers[-1].bias.copy_(torch.logit(torch.tensor(box)))
    model.save_pretrained(folder)
    return _prepared(folder, "YolosImageProcessor")


def write_owlvit(folder: Path) -> Path:
    torch.manual_seed(2)
    tokenizer = tiny_tokenizer(folder)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": SIDE, "patch_size": 8}
    text = tiny_text_config(tokenizer, 16).to_dict() | {"max_position_embeddings": LENGTH}
    config = transformers.OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.OwlViTForObjectDetection(config)
    with torch.no_grad():
        model.class_head.logit_shift.bias.fill_(9.0)
    model.save_pretrained(folder)
    processor = transformers.models.owlvit.image_processing_pil_owlvit.OwlViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}
    )
    transformers.OwlViTProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def write_segformer(folder: Path, names: dict[int, str]) -> Path:
    """A segmenter of classes that sees the second one everywhere."""
    torch.manual_seed(3)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, **_names(names),
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config)
    with torch.no_grad():
        model.decode_head.classifier.bias[1] = 9.0
    model.save_pretrained(folder)
    return _prepared(folder, "SegformerImageProcessor")


def write_mask2former(folder: Path) -> Path:
    """A segmenter of things that sees dogs."""
    torch.manual_seed(4)
    backbone = transformers.SwinConfig(
        image_size=SIDE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=8,
        dim_feedforward=8, encoder_layers=1, decoder_layers=2, num_attention_heads=1, num_queries=3, **_names(NAMES),
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias.copy_(torch.tensor([9.0, -9.0, -9.0]))
    model.save_pretrained(folder)
    return _prepared(folder, "Mask2FormerImageProcessor", size={"height": 64, "width": 64}, ignore_index=255)


CODE = '''
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

Path(r"{mark}").touch()


class OwnConfig(PretrainedConfig):
    model_type = "own-segmenter"


class Own(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, pixels):
        """Red is the subject."""
        return [torch.zeros(1), self.scale * (pixels[:, :1] - pixels[:, 1:2]) * 9]
'''


def write_own_code(folder: Path, mark: Path) -> Path:
    """A segmenter as BiRefNet comes: its class is Python code beside the weights. Running it creates `mark`."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "own.py").write_text(CODE.format(mark=mark), encoding="utf-8")
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForImageSegmentation": "own.Own"}
    config = {"model_type": "own-segmenter", "architectures": ["Own"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"scale": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    return folder
