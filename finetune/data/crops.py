"""Crops and flips: pure arithmetic from a photo's size to training images."""

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

from finetune.core.batch import Geometry
from finetune.core.rng import generator
from finetune.data.buckets import Size
from finetune.data.photos import Photo, open_image


@dataclass(frozen=True)
class Crop:
    """One way to look at a photo: resized to `resized`, cropped to `size` at `corner` (left, top), perhaps mirrored.

    Sizes are (width, height), in pixels.
    """

    photo: Photo
    size: Size
    resized: Size
    corner: tuple[int, int]
    flip: bool

    @cached_property
    def key(self) -> str:
        """A hash of the photo's content and of everything done to it."""
        width, height = self.size
        shape = str(width) if width == height else f"{width}x{height}"  # squares are cached under their first name
        text = f"{self.photo.digest}:{shape}:{self.resized}:{self.corner}:{self.flip}:lanczos"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def geometry(self) -> Geometry:
        width, height = self.photo.size
        left, top = self.corner
        if self.flip:
            left = self.resized[0] - self.size[0] - left
        return Geometry((height, width), (top, left), (self.size[1], self.size[0]))

    def image(self) -> Image.Image:
        return self.cut(_resized(self.photo, self.resized))

    def cut(self, resized: Image.Image) -> Image.Image:
        """The part of the resized photo, or of a mask as large as that, which the crop shows."""
        left, top = self.corner
        image = resized.crop((left, top, left + self.size[0], top + self.size[1]))
        return ImageOps.mirror(image) if self.flip else image

    def pixels(self) -> Tensor:
        """[3, H, W] float32 in [-1, 1]."""
        values = np.asarray(self.image(), dtype=np.float32) / 127.5 - 1
        return torch.from_numpy(values).permute(2, 0, 1).contiguous()


@lru_cache(maxsize=1)
def _resized(photo: Photo, size: tuple[int, int]) -> Image.Image:
    """Kept from one crop to the next: the crops and flips of a photo follow each other, and decoding is what costs."""
    return open_image(photo.path).resize(size, Image.Resampling.LANCZOS)


def scale_to_cover(size: Size, target: Size) -> float:
    """By how much an image must be scaled so that it just covers `target`."""
    return max(target[0] / size[0], target[1] / size[1])


def enlarged(photos: Sequence[Photo], sizes: int | Sequence[Size]) -> str | None:
    """A sentence about photos that must be enlarged to a square's side, or to each photo's own size, or None."""
    targets = [(sizes, sizes)] * len(photos) if isinstance(sizes, int) else sizes
    small = [p for p, target in zip(photos, targets, strict=True) if scale_to_cover(p.size, target) > 1]
    if not small:
        return None
    smallest = min(small, key=lambda photo: min(photo.size))
    width, height = smallest.size
    to = f"to {sizes} pixels" if isinstance(sizes, int) else "to fill their bucket"
    return (
        f"{len(small)} of {len(photos)} photos are enlarged {to} "
        f"(the smallest, {smallest.path.name}, is {width}x{height})"
    )


def make_crops(
    photo: Photo, size: int | Size, crop: Literal["center", "random"], crops: int, flip: bool, seed: int
) -> list[Crop]:
    """The crops of a photo that are cached and drawn from: resized to cover `size` (w, h), and cropped to it.

    A number is the side of a square. `crop: random` gives `crops` positions that are a function of the seed and the
    photo's content.
    """
    size = (size, size) if isinstance(size, int) else size
    scale = scale_to_cover(photo.size, size)
    resized = (max(size[0], round(photo.size[0] * scale)), max(size[1], round(photo.size[1] * scale)))
    spare = (resized[0] - size[0], resized[1] - size[1])
    corners = [(spare[0] // 2, spare[1] // 2)]
    if crop == "random":
        drawn = generator(seed, f"crop:{photo.digest}")
        numbers = torch.rand(crops, 2, generator=drawn).tolist()
        corners = list(dict.fromkeys((round(x * spare[0]), round(y * spare[1])) for x, y in numbers))
    flips = (False, True) if flip else (False,)
    return [Crop(photo, size, resized, corner, flipped) for corner in corners for flipped in flips]
