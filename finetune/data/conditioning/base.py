"""Extra inputs: what some bases read in addition to noisy latents. To add a kind, add one file to this package."""

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
from finetune.data.decoding import BadImage
from finetune.data.photos import Photo, companion, read_photo
from finetune.families.base import Family
from finetune.families.drawing import ImageCondition

SHAPE = 0.02  # allowed relative difference from the photo's aspect ratio: resizing rounds


@dataclass(frozen=True)
class Choices:
    """The recipe's settings for extra inputs."""

    seed: int
    mask_count: int
    edit_dropout: float
    image_guidance: float


class Inputs(ABC):
    """One kind of extra input, created once for the photos of a run. The latent cache holds all of its `images`."""

    kind: ClassVar[str]
    # whether they can be computed for any image, such as a class image
    any_image: ClassVar[bool] = False

    def __init__(self, family: Family, photos: Sequence[Photo], choices: Choices) -> None:
        """Raises BadInput if a photo lacks a file that this kind needs."""
        self.factor, self.choices = family.codec.factor, choices

    def images(self, crop: Crop) -> list[Encodable]:
        """Returns the further images of a crop that the VAE must encode for the cache."""
        return []

    @abstractmethod
    def extra(self, crop: Crop, key: SampleKey, cache: Cache) -> Tensor:
        """Returns the channels after the noisy latents, [E, h, w] float32, for one sample."""

    def prompt(self, prompt: str, key: SampleKey) -> str:
        """Returns the prompt to train with. Kinds that drop extra inputs and prompt together override this."""
        return prompt

    def files(self, photo: Photo) -> dict[str, Path]:
        """What is read beside a photo: what it is -> its file. A run records them."""
        return {}

    def origins(self, photo: Photo) -> dict[str, str]:
        """What `condition` reads from files: "image", "mask" or "depth" -> the file's SHA-256."""
        return {"image": photo.digest}

    def condition(self, crop: Crop) -> ImageCondition:
        """Returns the input for drawing an image like this crop."""
        return ImageCondition(unit(crop.pixels()))


def unit(pixels: Tensor) -> Tensor:
    """Returns pixels in [0, 1] from pixels in [-1, 1], of any shape; values outside are clamped."""
    return ((pixels + 1) / 2).clamp(0, 1)


def make_inputs(family: Family, photos: Sequence[Photo], choices: Choices) -> Inputs | None:
    """Returns the extra inputs of the family for these photos, or None if it has none.

    Raises:
        BadInput: files beside the photos are missing (the message names them all) or can't be used.
    """
    return None if family.inputs is None else INPUTS[family.inputs](family, photos, choices)


INPUTS: Registry[Inputs] = Registry(Inputs, "finetune.data.conditioning", lambda item: item.kind)


def companions(photos: Sequence[Photo], kind: str, name: str) -> dict[Path, Photo]:
    """Returns photo file -> the image NAME.`name`.png (or another image suffix) beside it.

    `kind` is the kind of extra inputs, for messages.

    Raises:
        BadInput: a photo has no such image, or it can't be used or has another aspect ratio.
    """
    files = {photo.path: companion(photo.path, name) for photo in photos}
    missing = [path.name for path, file in files.items() if file is None]
    if missing:
        raise BadInput(
            f"the base reads {kind} inputs but there is no {name} image for {', '.join(missing)}: put "
            f"NAME.{name}.png beside each"
        )
    found = {}
    for photo in photos:
        try:
            found[photo.path] = read_photo(files[photo.path] or photo.path)
        except BadImage as fault:
            raise BadInput(f"the {name} image of {photo.path.name} can't be used: {fault.reason}") from fault
        _check_shape(photo, found[photo.path])
    return found


def _check_shape(photo: Photo, other: Photo) -> None:
    (width, height), (photo_width, photo_height) = other.size, photo.size
    if abs(width * photo_height / (height * photo_width) - 1) > SHAPE:
        raise BadInput(
            f"{other.path.name} is {width}x{height} but its photo {photo.path.name} is {photo_width}x{photo_height}: "
            "give it the photo's aspect ratio"
        )


def same_crop(crop: Crop, photo: Photo) -> Crop:
    """Returns a crop of another image, with the same size, position and mirroring as `crop`."""
    return replace(crop, photo=photo)
