"""Depth maps as extra inputs: NAME.depth.png beside each photo, near and far as the base was trained with.

Stable Diffusion 2 depth was trained on inverse depth (MiDaS): near is bright.
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
    kind = "depth"

    def __init__(self, family: Family, photos: Sequence[Photo], choices: Choices) -> None:
        super().__init__(family, photos, choices)
        self.maps = companions(photos, self.kind, "depth")
        for found in self.maps.values():
            values = open_values(found.path)
            if float(values.max()) == float(values.min()):
                raise BadInput(
                    f"the depth picture {found.path.name} is {values.max():g} everywhere: it shows no depth"
                )
        self.entries: dict[str, Tensor] = {}

    def extra(self, crop: Crop, key: SampleKey, cache: Cache) -> Tensor:
        """[1, h, w] in [-1, 1]."""
        if crop.key not in self.entries:
            self.entries[crop.key] = scaled(self._cut(crop), self.factor)
        return self.entries[crop.key]

    def files(self, photo: Photo) -> dict[str, Path]:
        return {"depth map": self.maps[photo.path].path}

    def condition(self, crop: Crop) -> ImageCondition:
        depth = self._cut(crop)
        low, high = depth.min(), depth.max()
        return ImageCondition(unit(crop.pixels()), (depth - low) / (high - low).clamp(min=1e-8))

    def _cut(self, crop: Crop) -> Tensor:
        """[1, H, W]: the depth of a crop's pixels, in the file's own values."""
        (left, top), (height, width) = crop.corner, crop.geometry.target
        image = _resized(self.maps[crop.photo.path], crop.resized).crop((left, top, left + width, top + height))
        return torch.from_numpy(np.array(ImageOps.mirror(image) if crop.flip else image, dtype=np.float32))[None]


def scaled(depth: Tensor, factor: int) -> Tensor:
    """[1, H, W] -> [1, H / factor, W / factor]: what lies nearest and farthest becomes -1 and 1, as in diffusers'
    pipeline; zeros where a crop is flat, of which the pipeline makes no number."""
    small = interpolate(
        depth[None], (depth.shape[-2] // factor, depth.shape[-1] // factor), mode="bicubic", align_corners=False
    )[0]
    low, high = small.min(), small.max()
    return torch.zeros_like(small) if high == low else 2 * (small - low) / (high - low) - 1


@lru_cache(maxsize=1)
def _resized(photo: Photo, size: tuple[int, int]) -> Image.Image:
    """Floats, since 16-bit depth has more than 256 levels; by a filter that does not overshoot at edges."""
    return Image.fromarray(open_values(photo.path)).resize(size, Image.Resampling.BILINEAR)
