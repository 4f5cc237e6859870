"""Editing pairs (arXiv:2211.09800): NAME.before.png beside each photo, with the edit instruction as its caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from finetune.core.rng import SampleKey, uniform
from finetune.data.cache import Cache, Encodable
from finetune.data.conditioning.base import Choices, Inputs, companions, same_crop, unit
from finetune.data.crops import Crop
from finetune.data.photos import Photo
from finetune.families.base import Family
from finetune.families.drawing import ImageCondition


class Edit(Inputs):
    """Images before an edit: four further channels."""

    kind = "edit"

    def __init__(self, family: Family, photos: Sequence[Photo], choices: Choices) -> None:
        super().__init__(family, photos, choices)
        self.before = companions(photos, self.kind, "before")
        self.scaling = family.codec.scaling

    def images(self, crop: Crop) -> list[Encodable]:
        """Returns the same crop of the image before the edit."""
        return [self._before(crop)]

    def extra(self, crop: Crop, key: SampleKey, cache: Cache) -> Tensor:
        """Returns the mean latents of the image before the edit, [4, h, w], unscaled, or zeros if they are dropped."""
        latents = cache.latents(self._before(crop)).mean / self.scaling
        return torch.zeros_like(latents) if dropped(key, self.choices.edit_dropout)[0] else latents

    def prompt(self, prompt: str, key: SampleKey) -> str:
        """Returns the instruction, or an empty text if it is dropped for this sample."""
        return "" if dropped(key, self.choices.edit_dropout)[1] else prompt

    def files(self, photo: Photo) -> dict[str, Path]:
        return {"image before": self.before[photo.path].path}

    def origins(self, photo: Photo) -> dict[str, str]:
        return {"image": self.before[photo.path].digest}

    def condition(self, crop: Crop) -> ImageCondition:
        """Returns the image before the edit, [3, H, W] in [0, 1], and the image guidance scale."""
        return ImageCondition(unit(self._before(crop).pixels()), guidance=self.choices.image_guidance)

    def _before(self, crop: Crop) -> Crop:
        return same_crop(crop, self.before[crop.photo.path])


def dropped(key: SampleKey, share: float) -> tuple[bool, bool]:
    """Returns whether a sample's image, and whether its instruction, is dropped (arXiv:2211.09800 section 3.2.1).

    A share `share` of all samples loses only the image, an equal share only the instruction, and an equal share both.
    """
    u = float(uniform([key], "edit"))
    return u < 2 * share, share <= u < 3 * share
