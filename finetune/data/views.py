"""Crops and flips: pure arithmetic from a photo's size to training pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from finetune.batch import Geometry
from finetune.data.photos import Photo, open_picture
from finetune.draws import generator


@dataclass(frozen=True)
class View:
    """One way to look at a photo: resized to `resized` (w, h), cropped at `crop` (left, top), perhaps mirrored."""

    photo: Photo
    resolution: int
    resized: tuple[int, int]
    crop: tuple[int, int]
    flip: bool

    @cached_property
    def key(self) -> str:
        """A hash of the photo's content and of everything done to it."""
        text = f"{self.photo.digest}:{self.resolution}:{self.resized}:{self.crop}:{self.flip}:lanczos"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def geometry(self) -> Geometry:
        width, height = self.photo.size
        left, top = self.crop
        if self.flip:
            left = self.resized[0] - self.resolution - left
        return Geometry((height, width), (top, left), (self.resolution, self.resolution))

    def picture(self) -> Image.Image:
        left, top = self.crop
        image = _resized(self.photo, self.resized).crop((left, top, left + self.resolution, top + self.resolution))
        return ImageOps.mirror(image) if self.flip else image

    def pixels(self) -> Tensor:
        """[3, H, W] float32 in [-1, 1]."""
        values = np.asarray(self.picture(), dtype=np.float32) / 127.5 - 1
        return torch.from_numpy(values).permute(2, 0, 1).contiguous()


@lru_cache(maxsize=1)
def _resized(photo: Photo, size: tuple[int, int]) -> Image.Image:
    """Kept from one view to the next: the crops and flips of a photo follow each other, and decoding is what costs."""
    return open_picture(photo.path).resize(size, Image.Resampling.LANCZOS)


def enlarged(photos: Sequence[Photo], resolution: int) -> str | None:
    """A sentence about photos that must be enlarged to `resolution`, or None."""
    small = sorted((photo for photo in photos if min(photo.size) < resolution), key=lambda photo: min(photo.size))
    if not small:
        return None
    width, height = small[0].size
    return (
        f"{len(small)} of {len(photos)} photos are enlarged to {resolution} pixels "
        f"(the smallest, {small[0].path.name}, is {width}x{height})"
    )


def views(
    photo: Photo, resolution: int, crop: Literal["center", "random"], crops: int, flip: bool, seed: int
) -> list[View]:
    """The views of a photo that are cached and drawn from: its shorter side becomes `resolution`, then square crops.

    `crop: random` gives `crops` positions that are a function of the seed and the photo's content.
    """
    width, height = photo.size
    scale = resolution / min(width, height)
    resized = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    spare = (resized[0] - resolution, resized[1] - resolution)
    corners = [(spare[0] // 2, spare[1] // 2)]
    if crop == "random":
        drawn = generator(seed, f"crop:{photo.digest}")
        numbers = torch.rand(crops, 2, generator=drawn).tolist()
        corners = list(dict.fromkeys((round(x * spare[0]), round(y * spare[1])) for x, y in numbers))
    flips = (False, True) if flip else (False,)
    return [View(photo, resolution, resized, corner, flipped) for corner in corners for flipped in flips]
