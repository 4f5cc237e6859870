"""Reads the image, mask or depth map that a person gives to draw from, for bases that read them.

Files are scaled to cover the square that is drawn and cropped in the middle, as diffusers' `VaeImageProcessor` does
with `resize_mode="crop"` and as training does with photos.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.core.errors import BadInput
from finetune.data.conditioning.base import SHAPE
from finetune.data.conditioning.depth import check_depth, cut_depth, unit_depth
from finetune.data.crops import Crop, make_crops
from finetune.data.decoding import BadImage, shown
from finetune.data.masks import Mask
from finetune.data.photos import Photo, read_photo
from finetune.families.base import Family
from finetune.families.drawing import ImageCondition, Wants
from finetune.sampling.settings import Sampling

PAINTED = 0.5  # a mask that is at least this bright is painted anew, as in diffusers' pipelines
IMAGE_GUIDANCE = 1.5  # the default of diffusers' pipeline
OVER = 0.8  # strength for an image beside a depth map: the default of diffusers' pipeline
FILES = ("image", "mask", "depth")
WORDS = {"image": "an image", "mask": "a mask", "depth": "a depth map"}
ADVICE = {
    "image": "give the image that it starts from",
    "mask": "give an image of the same shape, white where it is painted anew and black elsewhere",
    "depth": "give a depth map, near is bright, such as a depth estimator makes",
}


@dataclass(frozen=True)
class Given:
    """What a person gives to draw from besides the prompt.

    Attributes:
        image: the image to paint in (inpainting), to edit, or to start from (depth, SDXL refiner).
        mask: of the image's shape; white where inpainting paints anew. Transparent is black.
        depth: a depth map; near is bright. Where only the image is given, a base with an estimator makes the map.
        image_guidance: how closely an edit follows its image, at least 1; None: 1.5, as diffusers' pipeline has it.
        strength: the share of the noise that the image gets, in (0, 1]: 1 leaves nothing of it. None: 1 for
            inpainting, 0.8 beside a depth map, 0.3 for the refiner.
    """

    image: Path | None = None
    mask: Path | None = None
    depth: Path | None = None
    image_guidance: float | None = None
    strength: float | None = None

    def named(self) -> dict[str, Path | float]:
        """What is given, by name."""
        values = {name: getattr(self, name) for name in (*FILES, "image_guidance", "strength")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class DrawnFrom:
    """What was given, read and cropped.

    `condition` is None if nothing was given. `origins` are the SHA-256 of the files: "image", "mask", "depth".
    `notes` say what a person should know: how a file was cropped.
    """

    condition: ImageCondition | None = None
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_given(
    family: Family, given: Given, sampling: Sampling, section: str = "", image_guidance: float = IMAGE_GUIDANCE
) -> DrawnFrom:
    """Reads what is given for a base that draws from more than a prompt.

    `section` stands before a name in messages: "--" of a command's. `image_guidance` is taken where none is given.

    Raises:
        BadInput: the base needs something that is missing, or reads none of what is given; a file can't be used; a
            number has no effect.
    """
    wants = family.drawing.wants
    _refuse_unread(family, given, wants, section)
    estimator = family.drawing.depth_estimator if given.depth is None and given.image is not None else None
    _refuse_missing(given, wants, section, ("depth",) if estimator else ())
    _check_numbers(given, sampling, section)
    if not any(getattr(given, name) for name in FILES):
        return DrawnFrom(notes=_without(wants, section))
    photos = {name: _read(path, name, section) for name in FILES if (path := getattr(given, name))}
    side = sampling.size or family.resolution
    first = photos.get("image") or photos["depth"]
    for name, photo in photos.items():
        _check_shape(first, photo, name)
    crop = make_crops(first, side, "center", 1, False, 0)[0]
    image = _pixels(crop) if "image" in photos else torch.full((3, side, side), PAINTED)
    beside = unit_depth(estimator(crop.image())) if estimator else _beside(photos, crop)
    guidance = image_guidance if given.image_guidance is None else given.image_guidance
    condition = ImageCondition(image, beside, guidance, _strength(given, wants))
    notes = [note for photo in photos.values() if (note := _cropped(photo, side))]
    notes += [f"the depth map is made of {first.path.name} by the base's own estimator"] if estimator else []
    return DrawnFrom(condition, {name: photo.digest for name, photo in photos.items()}, notes)


def pictures(wants: Wants, condition: ImageCondition) -> dict[str, Image.Image]:
    """What a base reads from a condition, as images to show: "image", "mask", "depth"."""
    if not wants.names:
        return {}
    found = {}
    if "depth" not in wants.names or condition.strength is not None:
        found["image"] = _as_image(condition.image)
    if condition.beside is not None:
        height, width = condition.image.shape[-2:]
        beside = _as_image(condition.beside.expand(3, -1, -1))
        found["mask" if "mask" in wants.names else "depth"] = beside.resize((width, height))
    return found


def _as_image(values: Tensor) -> Image.Image:
    levels = (values * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(levels.contiguous().numpy())


def _refuse_unread(family: Family, given: Given, wants: Wants, section: str) -> None:
    for name, value in given.named().items():
        if name in wants.names:
            continue
        reads = _listed(WORDS[known] for known in wants.names if known in WORDS)
        raise BadInput(
            f"{_option(section, name)} is {shown(str(value))} but this base ({family.name}) "
            f"{f'draws from {reads}' if reads else 'draws from a prompt alone'}: leave it out"
            + ("" if reads else ", or use a base for inpainting, depth or editing")
        )


def _refuse_missing(given: Given, wants: Wants, section: str, made: tuple[str, ...]) -> None:
    """`made`: what need not be given, because it is made of the image."""
    for name in wants.needed:
        if getattr(given, name) is None and name not in made:
            all_of = _listed(WORDS[needed] for needed in wants.needed)
            raise BadInput(f"this base draws from {all_of} and {section}{name} is missing: {ADVICE[name]}")


def _check_numbers(given: Given, sampling: Sampling, section: str) -> None:
    option = _option(section, "image_guidance")
    if given.image_guidance is not None:
        if not (math.isfinite(given.image_guidance) and given.image_guidance >= 1):
            raise BadInput(f"{option} is {given.image_guidance}: give a number from 1 on, such as 1.5")
        if sampling.guidance <= 1:
            raise BadInput(
                f"{option} is {given.image_guidance} but {section}guidance is {sampling.guidance}, which switches "
                "both kinds of guidance off: leave it out, or raise the guidance"
            )
    strength = given.strength
    if strength is None:
        return
    if not 0 < strength <= 1:  # also for nan
        raise BadInput(f"{section}strength is {strength}: give a number above 0, and 1 at most, such as 0.8")
    if int(sampling.steps * strength) < 1:
        raise BadInput(
            f"{section}strength {strength} leaves none of the {sampling.steps} steps: give at least "
            f"{math.ceil(100 / sampling.steps) / 100:g}, or more steps"
        )
    if given.image is None:
        raise BadInput(
            f"{section}strength is {strength} but {section}image is missing, so it has no effect: give an image, or "
            "leave it out"
        )


def _strength(given: Given, wants: Wants) -> float | None:
    beside_depth = given.strength is None and given.image is not None and "depth" in wants.names
    return OVER if beside_depth else given.strength


def _without(wants: Wants, section: str) -> list[str]:
    """What is said of a base that may have an image and got none."""
    if "image" not in wants.also:
        return []
    return [f"without {section}image this base starts from pure noise, for which it was not trained"]


def _read(path: Path, name: str, section: str) -> Photo:
    try:
        return read_photo(Path(path).expanduser())
    except BadImage as fault:
        raise BadInput(f"{section}{name} {shown(path)} can't be used: {fault.reason}", path=path) from fault


def _check_shape(first: Photo, photo: Photo, name: str) -> None:
    (width, height), (first_width, first_height) = photo.size, first.size
    if abs(width * first_height / (height * first_width) - 1) > SHAPE:
        raise BadInput(
            f"the {name} {photo.path.name} is {width}x{height} but {first.path.name} is {first_width}x{first_height}: "
            "give it the image's aspect ratio"
        )


def _pixels(crop: Crop) -> Tensor:
    """[3, H, W] float32 in [0, 1], the values that diffusers makes of the same image."""
    return torch.from_numpy(np.asarray(crop.image(), dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def _beside(photos: dict[str, Photo], crop: Crop) -> Tensor | None:
    if "mask" in photos:
        return _mask(photos["mask"], crop)
    return _depth(photos["depth"], crop) if "depth" in photos else None


def _mask(photo: Photo, crop: Crop) -> Tensor:
    """[1, H, W] float32 in [0, 1]."""
    mask = Mask(photo.path, photo.digest)
    image = crop.cut(mask.open().resize(crop.resized, Image.Resampling.LANCZOS))
    values = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]
    if float(values.max()) < PAINTED:
        raise BadInput(
            f"the mask {photo.path.name} is white nowhere (at most {round(float(values.max()) * 255)} of 255 in what "
            "is drawn), so that nothing would be painted: make white what is to be painted anew"
        )
    return values


def _depth(photo: Photo, crop: Crop) -> Tensor:
    """[1, H, W] float32 in [0, 1]."""
    check_depth(photo.path)
    depth = cut_depth(photo, crop)
    if float(depth.max()) == float(depth.min()):
        raise BadInput(
            f"the depth map {photo.path.name} is {float(depth.max()):g} everywhere in the square that is drawn: give "
            "one with depth in its middle"
        )
    return unit_depth(depth)


def _cropped(photo: Photo, side: int) -> str | None:
    width, height = photo.size
    if (width, height) == (side, side):
        return None
    how = "is scaled" if width == height else "is scaled and cropped in the middle"
    return f"{photo.path.name} ({width}x{height}) {how} to {side}x{side}"


def _option(section: str, name: str) -> str:
    return f"{section}{name.replace('_', '-') if section == '--' else name}"


def _listed(words: Iterable[str]) -> str:
    return " and ".join(words)
