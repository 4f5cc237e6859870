"""What a base reads besides its noisy latents, for every crop of every photo. A new kind is one new file here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from finetune.core.errors import BadInput
from finetune.core.registry import Registry
from finetune.core.rng import SampleKey
from finetune.data.cache import Cache, Encodable
from finetune.data.crops import Crop
from finetune.data.photos import BadImage, Photo, companion, read_photo
from finetune.families.base import Family
from finetune.families.drawing import ImageCondition

SHAPE = 0.02  # a companion's aspect ratio may be so far off its photo's: rounding, when it was made smaller


@dataclass(frozen=True)
class Choices:
    """What a recipe says of extra inputs."""

    seed: int
    mask_count: int
    edit_dropout: float
    image_guidance: float


class Inputs(ABC):
    """One kind of extra input. Made once from the photos; `cache` holds the latents of all `images`."""

    kind: ClassVar[str]
    # whether they can be made for any image, so for class images too
    any_image: ClassVar[bool] = False

    def __init__(self, family: Family, photos: Sequence[Photo], choices: Choices) -> None:
        """Raises BadInput where a photo lacks what belongs beside it."""
        self.factor, self.choices = family.codec.factor, choices

    def images(self, crop: Crop) -> list[Encodable]:
        """What the VAE encodes, once, for a crop."""
        return []

    @abstractmethod
    def extra(self, crop: Crop, key: SampleKey, cache: Cache) -> Tensor:
        """[E, h, w] float32: the channels behind the noisy latents."""

    def prompt(self, prompt: str, key: SampleKey) -> str:
        """The prompt that is trained, where extra inputs and prompt are dropped together."""
        return prompt

    def files(self, photo: Photo) -> dict[str, Path]:
        """What is read beside a photo: what it is -> its file. A run records them."""
        return {}

    def condition(self, crop: Crop) -> ImageCondition:
        """What an image like this crop is drawn from."""
        return ImageCondition(unit(crop.pixels()))


def unit(pixels: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return ((pixels + 1) / 2).clamp(0, 1)


def make_inputs(family: Family, photos: Sequence[Photo], choices: Choices) -> Inputs | None:
    """What the family reads besides its latents; None for nothing.

    Raises:
        BadInput: files beside the photos are missing (all are named), or can't be used.
    """
    return None if family.inputs is None else INPUTS[family.inputs](family, photos, choices)


INPUTS: Registry[Inputs] = Registry(Inputs, "finetune.data.conditioning", lambda item: item.kind)


def companions(photos: Sequence[Photo], kind: str, name: str) -> dict[Path, Photo]:
    """Photo file -> the image NAME.`name`.png (or another suffix) beside it.

    Raises:
        BadInput: photos without one, or images of another shape than their photos.
    """
    files = {photo.path: companion(photo.path, name) for photo in photos}
    missing = [path.name for path, file in files.items() if file is None]
    if missing:
        raise BadInput(
            f"the base reads {kind} inputs but there is no {name} picture for {', '.join(missing)}: put "
            f"NAME.{name}.png beside each"
        )
    found = {}
    for photo in photos:
        try:
            found[photo.path] = read_photo(files[photo.path] or photo.path)
        except BadImage as fault:
            raise BadInput(f"the {name} picture of {photo.path.name} can't be used: {fault.reason}") from fault
        _check_shape(photo, found[photo.path])
    return found


def _check_shape(photo: Photo, other: Photo) -> None:
    (width, height), (photo_width, photo_height) = other.size, photo.size
    if abs(width * photo_height / (height * photo_width) - 1) > SHAPE:
        raise BadInput(
            f"{other.path.name} is {width}x{height} but its photo {photo.path.name} is {photo_width}x{photo_height}: "
            "give it the photo's shape"
        )


def same_crop(crop: Crop, photo: Photo) -> Crop:
    """Another image cropped and mirrored as `crop` is."""
    return replace(crop, photo=photo)
