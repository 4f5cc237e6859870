"""The depth estimator in the folder of a depth base, with which diffusers' pipeline makes depth maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from finetune.core.errors import BadInput
from finetune.families.configs import check_configs, read_config, well_formed
from finetune.families.parts import PartSource

ESTIMATOR = PartSource("depth_estimator", transformers.DPTForDepthEstimation)
PREPARES = "feature_extractor/preprocessor_config.json"
FOREIGN = ("backbone", "use_timm_backbone", "use_pretrained_backbone")  # they name a model to fetch


def has_estimator(base: Path) -> bool:
    """Whether a base's folder holds a depth estimator."""
    return ESTIMATOR.is_in(base) and (base / PREPARES).is_file()


@torch.no_grad()
def estimate_depth(base: Path, device: torch.device, image: Image.Image) -> Tensor:
    """The inverse depth of an RGB image by the base's own estimator, as diffusers' pipeline computes it: [1, h, w]
    float32 on the CPU, near is large. h and w are the estimator's, not the image's.

    Raises:
        BadInput: the estimator is damaged or would fetch other models, or it finds one depth everywhere.
    """
    check_configs(base, [ESTIMATOR.folder, "feature_extractor"])
    config = read_config(base, f"{ESTIMATOR.folder}/config.json")
    foreign = next((key for key in FOREIGN if config.get(key)), None)
    if foreign is not None:
        raise BadInput(f"{base}/{ESTIMATOR.folder}/config.json has {foreign}, a model to fetch: give a depth map")
    model: Any = ESTIMATOR.load(base, torch.float32).to(device)
    with well_formed(base):
        prepare: Any = _preparation().from_pretrained(base / "feature_extractor")
        pixels = prepare(images=[image], return_tensors="pt").pixel_values
        depth: Tensor = model(pixels.to(device)).predicted_depth.float().cpu()
    if not (torch.isfinite(depth).all() and depth.max() > depth.min()):
        raise BadInput("the base's depth estimator finds no depth in this image: give a depth map")
    return depth


def _preparation() -> Any:
    """The class of DPT's preparation of images that needs no torchvision, where transformers has it."""
    return getattr(transformers, "DPTImageProcessorPil", transformers.DPTImageProcessor)
