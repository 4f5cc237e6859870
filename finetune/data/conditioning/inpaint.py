"""Extra inputs for inpainting: a random mask, and the latents of the image with the masked area removed.

A fixed number of masks is drawn for each crop, so that the masked images are encoded only once. Each step draws one of
these masks for a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from finetune.core.rng import SampleKey, generator, uniform
from finetune.data.cache import Cache, Encodable
from finetune.data.conditioning.base import Choices, Inputs, unit
from finetune.data.crops import Crop
from finetune.data.photos import Photo
from finetune.families.base import Family
from finetune.families.drawing import ImageCondition

WHOLE = 0.25  # share of masks that cover everything, as in Stable Diffusion inpainting (its model card)
LEAST = 1 / 8  # of a side: the smallest mask
STROKES, POINTS = 4, 6  # most strokes in a mask; points in each stroke


@dataclass(frozen=True)
class MaskedCrop:
    """A crop with its `number`-th mask applied: masked pixels are grey, which is 0 in [-1, 1]."""

    crop: Crop
    seed: int
    number: int

    @cached_property
    def key(self) -> str:
        """A hash of the crop and its mask."""
        return hashlib.sha256(f"{self.crop.key}:{self.seed}:{self.number}:masked".encode()).hexdigest()

    def mask(self) -> Tensor:
        """Returns the mask [1, H, W] float32: 1 where the base must paint, else 0."""
        height, width = self.crop.geometry.target
        drawn = draw_mask(width, height, generator(self.seed, f"mask:{self.crop.key}", self.number))
        return torch.from_numpy(np.array(drawn, dtype=np.float32))[None] / 255

    def pixels(self) -> Tensor:
        """Returns the masked image as [3, H, W] float32 in [-1, 1]."""
        return self.crop.pixels() * (1 - self.mask())


class Inpaint(Inputs):
    """Random masks and masked images: five further channels."""

    kind = "inpaint"
    any_image = True

    def __init__(self, family: Family, photos: Sequence[Photo], choices: Choices) -> None:
        super().__init__(family, photos, choices)
        self.small: dict[str, Tensor] = {}

    def masked(self, crop: Crop) -> list[MaskedCrop]:
        """Returns the crop with each of its `mask_count` masks."""
        return [MaskedCrop(crop, self.choices.seed, number) for number in range(self.choices.mask_count)]

    def images(self, crop: Crop) -> list[Encodable]:
        """Returns the masked crops, which the VAE must encode."""
        return list(self.masked(crop))

    def extra(self, crop: Crop, key: SampleKey, cache: Cache) -> Tensor:
        """Returns [5, h, w]: the mask, and the mean of the masked image's latents.

        The mask is read at every `factor`-th pixel, as in diffusers' pipeline.
        """
        masked = self.masked(crop)
        chosen = masked[int(uniform([key], "mask") * len(masked))]
        if chosen.key not in self.small:
            height, width = crop.geometry.target
            size = (height // self.factor, width // self.factor)
            self.small[chosen.key] = interpolate(chosen.mask()[None], size)[0]
        return torch.cat([self.small[chosen.key], cache.latents(chosen).mean])

    def condition(self, crop: Crop) -> ImageCondition:
        """Returns the crop's pixels [3, H, W] in [0, 1], and its first mask [1, H, W]."""
        return ImageCondition(unit(crop.pixels()), self.masked(crop)[0].mask())


def draw_mask(width: int, height: int, source: torch.Generator) -> Image.Image:
    """Returns a random mask, 8-bit grey, of `width` x `height` pixels: white where the base must paint, else black.

    White is everything, a rectangle, an ellipse (as in diffusers' DreamBooth inpainting script) or strokes.
    """
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    whole, shape, *u = torch.rand(6, generator=source).tolist()
    if whole < WHOLE:
        return Image.new("L", (width, height), 255)
    if shape < 1 / 3:
        _strokes(pen, width, height, source)
        return mask
    w, h = (side * (LEAST + (1 - LEAST) * share) for side, share in zip((width, height), u[:2], strict=True))
    left, top = (width - w) * u[2], (height - h) * u[3]
    (pen.rectangle if shape < 2 / 3 else pen.ellipse)((left, top, left + w, top + h), fill=255)
    return mask


def _strokes(pen: ImageDraw.ImageDraw, width: int, height: int, source: torch.Generator) -> None:
    """Draws lines with a width of an eighth to a quarter of the shorter side."""
    count = 1 + int(torch.rand((), generator=source) * STROKES)
    for _ in range(count):
        points = (torch.rand(POINTS, 2, generator=source) * torch.tensor([width, height])).tolist()
        thick = round(min(width, height) * LEAST * (1 + float(torch.rand((), generator=source))))
        pen.line([(x, y) for x, y in points], fill=255, width=max(1, thick), joint="curve")
