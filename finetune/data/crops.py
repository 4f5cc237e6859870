"""Crops and flips: computes the training images of a photo."""

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
from finetune.data.buckets import Size, shared_pair
from finetune.data.photos import Photo


@dataclass(frozen=True)
class Crop:
    """A training image: a photo resized to `resized`, cropped to `size` at `corner` (left, top), mirrored if `flip`.

    Sizes are (width, height) and everything is in pixels.
    """

    photo: Photo
    size: Size
    resized: Size
    corner: tuple[int, int]
    flip: bool

    @cached_property
    def key(self) -> str:
        """A hash of the photo's content and of the crop."""
        width, height = self.size
        shape = (
            str(width) if width == height else f"{width}x{height}"
        )  # squares keep the key of earlier versions, so that old caches stay valid
        text = f"{self.photo.digest}:{shape}:{self.resized}:{self.corner}:{self.flip}:lanczos"
        text += ":srgb" if self.photo.recoloured else ""  # earlier versions cached these with wrong colours
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def geometry(self) -> Geometry:
        """The sizes and the corner as (height, width) and (top, left), for SDXL's time ids."""
        width, height = self.photo.size
        left, top = self.corner
        if self.flip:
            left = self.resized[0] - self.size[0] - left
        return Geometry((height, width), (top, left), (self.size[1], self.size[0]))

    def image(self) -> Image.Image:
        """Returns the training image, RGB.

        Raises:
            BadImage: the photo can't be read.
        """
        return self.cut(_resized(self.photo, self.resized))

    def cut(self, resized: Image.Image) -> Image.Image:
        """Returns this crop of an image of size `resized`: the resized photo, or a mask of the same size."""
        left, top = self.corner
        image = resized.crop((left, top, left + self.size[0], top + self.size[1]))
        return ImageOps.mirror(image) if self.flip else image

    def pixels(self) -> Tensor:
        """Returns the training image as [3, H, W] float32 in [-1, 1]."""
        values = np.asarray(self.image(), dtype=np.float32) / 127.5 - 1
        return torch.from_numpy(values).permute(2, 0, 1).contiguous()


@lru_cache(maxsize=1)
def _resized(photo: Photo, size: tuple[int, int]) -> Image.Image:
    """Cached for one photo: its crops and flips are used one after another, and decoding is the slow part."""
    return photo.open().resize(size, Image.Resampling.LANCZOS)


def scale_to_cover(size: Size, target: Size) -> float:
    """Returns the factor by which an image of `size` must be scaled to just cover `target`."""
    return max(target[0] / size[0], target[1] / size[1])


def enlarged(photos: Sequence[Photo], sizes: int | Sequence[Size]) -> str | None:
    """Returns a sentence about the photos that must be enlarged, or None if there are none.

    `sizes` is the side of a square, or the (width, height) of each photo's bucket, in pixels.
    """
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
    """Returns the crops of a photo that training caches and draws from.

    The photo is resized to cover `size` and cropped to it. `size` is (width, height), or the side of a square, in
    pixels. With `crop="random"` there are up to `crops` positions, which depend only on the seed and the photo's
    content. With `flip`, every crop appears mirrored too.
    """
    size = shared_pair(size, size) if isinstance(size, int) else size
    scale = scale_to_cover(photo.size, size)
    resized = shared_pair(max(size[0], round(photo.size[0] * scale)), max(size[1], round(photo.size[1] * scale)))
    spare = (resized[0] - size[0], resized[1] - size[1])
    corners = [shared_pair(spare[0] // 2, spare[1] // 2)]
    if crop == "random":
        drawn = generator(seed, f"crop:{photo.digest}")
        numbers = torch.rand(crops, 2, generator=drawn).tolist()
        corners = list(dict.fromkeys((round(x * spare[0]), round(y * spare[1])) for x, y in numbers))
    flips = (False, True) if flip else (False,)
    return [Crop(photo, size, resized, corner, flipped) for corner in corners for flipped in flips]
