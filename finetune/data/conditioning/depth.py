"""Depth maps as extra inputs: NAME.depth.png beside each photo.

Near and far must have the same sense as in the base's training. Stable Diffusion 2 depth was trained on inverse depth
(MiDaS), where near is bright.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from finetune.core.errors import BadInput
from finetune.core.rng import SampleKey
from finetune.data.cache import Cache
from finetune.data.conditioning.base import Choices, Inputs, companions, unit
from finetune.data.crops import Crop
from finetune.data.decoding import open_values, values_of
from finetune.data.photos import Photo
from finetune.families.base import Family
from finetune.families.drawing import ImageCondition


class Depth(Inputs):
    """Depth maps: one further channel."""

    kind = "depth"

    def __init__(self, family: Family, photos: Sequence[Photo], choices: Choices) -> None:
        super().__init__(family, photos, choices)
        self.maps = companions(photos, self.kind, "depth")
        for found in self.maps.values():
            check_depth(found.path)
        self.entries: dict[Crop, Tensor] = {}  # not by key: photos of one content may have different maps

    def extra(self, crop: Crop, key: SampleKey, cache: Cache) -> Tensor:
        """Returns the depth of the crop, [1, h, w] float32 in [-1, 1]."""
        if crop not in self.entries:
            self.entries[crop] = scaled(self._cut(crop), self.factor)
        return self.entries[crop]

    def files(self, photo: Photo) -> dict[str, Path]:
        return {"depth map": self.maps[photo.path].path}

    def condition(self, crop: Crop) -> ImageCondition:
        """Returns the crop's pixels and its depth [1, H, W], both in [0, 1]."""
        return ImageCondition(unit(crop.pixels()), unit_depth(self._cut(crop)))

    def origins(self, photo: Photo) -> dict[str, str]:
        return {"depth": self.maps[photo.path].digest}

    def _cut(self, crop: Crop) -> Tensor:
        return cut_depth(self.maps[crop.photo.path], crop)


def check_depth(file: Path) -> None:
    """Raises BadInput: a depth map without depth, or with values that are no numbers."""
    values = open_values(file)
    if not np.isfinite(values).all():
        raise BadInput(f"the depth image {file.name} holds values that are no finite numbers: replace it")
    if float(values.max()) == float(values.min()):
        raise BadInput(f"the depth image {file.name} is {values.max():g} everywhere, so it has no depth: replace it")


def cut_depth(depth: Photo, crop: Crop) -> Tensor:
    """Returns the crop of a depth map that belongs to the crop of a photo, [1, H, W], in the values of the file."""
    (left, top), (height, width) = crop.corner, crop.geometry.target
    image = _resized(depth, crop.resized).crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(ImageOps.mirror(image) if crop.flip else image, dtype=np.float32))[None]


def unit_depth(depth: Tensor) -> Tensor:
    """Returns depth [1, H, W] scaled to [0, 1]."""
    low, high = depth.min(), depth.max()
    return (depth - low) / (high - low).clamp(min=1e-8)


def scaled(depth: Tensor, factor: int) -> Tensor:
    """Returns depth [1, H, W] reduced to [1, H / factor, W / factor] and scaled to [-1, 1], as in diffusers' pipeline.

    A crop with one depth everywhere gives zeros; the pipeline would divide by zero.
    """
    small = interpolate(
        depth[None], (depth.shape[-2] // factor, depth.shape[-1] // factor), mode="bicubic", align_corners=False
    )[0]
    low, high = small.min(), small.max()
    return torch.zeros_like(small) if high == low else 2 * (small - low) / (high - low) - 1


@lru_cache(maxsize=1)
def _resized(photo: Photo, size: tuple[int, int]) -> Image.Image:
    """Resized as floats, because depth can have 16 bits, with a filter that does not overshoot at edges."""
    return Image.fromarray(values_of(photo.path, photo.content())).resize(size, Image.Resampling.BILINEAR)
