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
from finetune.data.photos import Photo, open_values
from finetune.families.base import Family
from finetune.families.drawing import ImageCondition


class Depth(Inputs):
    """Depth maps: one further channel."""

    kind = "depth"

    def __init__(self, family: Family, photos: Sequence[Photo], choices: Choices) -> None:
        super().__init__(family, photos, choices)
        self.maps = companions(photos, self.kind, "depth")
        for found in self.maps.values():
            values = open_values(found.path)
            if float(values.max()) == float(values.min()):
                raise BadInput(
                    f"the depth image {found.path.name} is {values.max():g} everywhere, so it has no depth: replace it"
                )
        self.entries: dict[str, Tensor] = {}

    def extra(self, crop: Crop, key: SampleKey, cache: Cache) -> Tensor:
        """Returns the depth of the crop, [1, h, w] float32 in [-1, 1]."""
        if crop.key not in self.entries:
            self.entries[crop.key] = scaled(self._cut(crop), self.factor)
        return self.entries[crop.key]

    def files(self, photo: Photo) -> dict[str, Path]:
        return {"depth map": self.maps[photo.path].path}

    def condition(self, crop: Crop) -> ImageCondition:
        """Returns the crop's pixels and its depth [1, H, W], both in [0, 1]."""
        depth = self._cut(crop)
        low, high = depth.min(), depth.max()
        return ImageCondition(unit(crop.pixels()), (depth - low) / (high - low).clamp(min=1e-8))

    def _cut(self, crop: Crop) -> Tensor:
        """The depth of a crop, [1, H, W], in the values of the file."""
        (left, top), (height, width) = crop.corner, crop.geometry.target
        image = _resized(self.maps[crop.photo.path], crop.resized).crop((left, top, left + width, top + height))
        return torch.from_numpy(np.array(ImageOps.mirror(image) if crop.flip else image, dtype=np.float32))[None]


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
    return Image.fromarray(open_values(photo.path)).resize(size, Image.Resampling.BILINEAR)
