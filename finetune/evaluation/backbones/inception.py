"""InceptionV3 of FID and KID: torch-fidelity's module with its published weights, and clean-fid's resizing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.core.errors import BadInput
from finetune.evaluation.backbones.base import Backbone, read_weights

SIDE = 299
LAYERS = (
    "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 Mixed_5b Mixed_5c "
    "Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c AvgPool"
).split()


class Inception(Backbone):
    """The 2048 features before the last layer, as FID defines them (TensorFlow's network of 2015).

    The images are resized as clean-fid does (arXiv:2104.11222): with Pillow's bicubic filter, which smooths before it
    makes smaller, each channel as floats, so that nothing is rounded to 8 bits.
    """

    kind = "inception"
    wants = "torch-fidelity's weights-inception-2015-12-05-6726825d.pth, or the same as .safetensors"

    def __init__(self, place: Path, name: str) -> None:
        module = extractor()
        if not place.is_file():
            self.place = place
            raise self.refuse("it is no file")
        super().__init__(place, name)
        held = io.BytesIO()  # the package would read a file as a pickle that may run code: it gets tensors of ours
        torch.save(read_weights(place), held)
        held.seek(0)
        try:
            self.model = module("inception", ["2048"], feature_extractor_weights_path=held)
        except (RuntimeError, KeyError, TypeError) as error:
            raise self.refuse("it does not hold the weights of FID's InceptionV3") from error
        self.model.eval().requires_grad_(False)

    def prepare(self, image: Image.Image) -> Tensor:
        return (resized(image, SIDE) - 128) / 128

    def look(self, images: Tensor) -> Tensor:
        for name in LAYERS:  # its own forward takes whole numbers and resizes anew
            images = getattr(self.model, name)(images)
        return images.flatten(1)


def resized(image: Image.Image, side: int) -> Tensor:
    """An RGB image -> [3, side, side] float32 in [0, 255], with clean-fid's resizing."""
    size = (side, side)
    channels = [
        np.asarray(Image.fromarray(channel, mode="F").resize(size, Image.Resampling.BICUBIC))
        for channel in np.moveaxis(np.asarray(image, dtype=np.float32), -1, 0)
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255))


def extractor() -> Any:
    """torch-fidelity's class.

    Raises:
        BadInput: the package, or torchvision, which it needs, is not installed.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise BadInput(
            f"KID and FID need the package torch-fidelity ({error}): pip install 'finetune-diffusion[evaluation]'"
        ) from error
    return FeatureExtractorInceptionV3
