"""Masks: which part of a photo is the subject. White has loss weight 1, black has `floor`, grey is in between.

A mask is a file (NAME.mask.png or masks/NAME.png beside the photo) or the photo's own alpha channel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from finetune.core.errors import BadInput
from finetune.data.buckets import Size
from finetune.data.crops import Crop
from finetune.data.decoding import alpha_channel, image_bytes, image_of, shown
from finetune.data.photos import MASK, Photo, image_files

FAINT = 10  # of 255: a mask that is nowhere brighter than this marks nothing, for example one with the values 0 and 1
SHAPE = 0.02  # allowed relative difference from the photo's aspect ratio: resizing rounds


@dataclass(frozen=True)
class Mask:
    """A photo's mask: an image file, or the alpha channel of the photo itself. `digest` is the file's SHA-256."""

    file: Path
    digest: str
    alpha: bool = False

    def open(self) -> Image.Image:
        """Returns the mask as an upright 8-bit grey image. Transparent pixels of a mask file are black.

        Raises:
            BadImage: the file can't be read.
            BadInput: it is not what `digest` says any more.
        """
        content = Photo(self.file, (0, 0), self.digest).content()
        if not self.alpha:
            return image_of(self.file, content, "black").convert("L")
        channel = alpha_channel(self.file, content)
        assert channel is not None
        return channel


MaskSource = Literal["none", "auto", "alpha", "files"]


def find_masks(folder: Path, photos: Sequence[Photo], source: MaskSource) -> dict[Path, Mask]:
    """Returns photo file -> mask, for the photos that have one. Every mask is opened once to check it.

    Raises:
        BadInput: `source` requires a mask for every photo and some have none, a mask belongs to no photo, or a mask
            can't be used.
    """
    next_to, inside = _masks_next_to(folder), _masks_inside(folder)
    files = {} if source in ("none", "alpha") else inside | next_to
    _refuse_orphans(folder, next_to | files)
    if source == "none":
        return {}
    found = {photo.path: mask for photo in photos if (mask := _mask_of(photo, files, source)) is not None}
    missing = [photo.path.name for photo in photos if photo.path not in found]
    if missing and source == "files":
        raise BadInput(
            f"data.masks is 'files' but there is no mask for {', '.join(missing)}: put NAME{MASK} or masks/NAME.png "
            "beside them, or set data.masks=auto"
        )
    if missing and source == "alpha":
        raise BadInput(
            f"data.masks is 'alpha' but {', '.join(missing)} have no alpha channel: save them with one, or set "
            "data.masks=auto"
        )
    for photo in photos:
        if photo.path in found:
            _check(photo, found[photo.path])
    return found


def _mask_of(photo: Photo, files: dict[str, Path], source: MaskSource) -> Mask | None:
    file = files.get(photo.path.stem)
    if file is not None:
        return Mask(file, hashlib.sha256(image_bytes(file)).hexdigest())
    seen = source != "files" and alpha_channel(photo.path) is not None
    return Mask(photo.path, photo.digest, alpha=True) if seen else None


def _masks_next_to(folder: Path) -> dict[str, Path]:
    """NAME -> NAME.mask.png."""
    files = [file for file in folder.iterdir() if not file.name.startswith(".")]
    return {file.name[: -len(MASK)]: file for file in files if file.name.lower().endswith(MASK)}


def _masks_inside(folder: Path) -> dict[str, Path]:
    """NAME -> masks/NAME.png."""
    files = (folder / "masks").iterdir() if (folder / "masks").is_dir() else ()
    return {file.stem: file for file in files if file.suffix.lower() == ".png" and not file.name.startswith(".")}


def _refuse_orphans(folder: Path, files: dict[str, Path]) -> None:
    """Refuses masks whose name matches no photo, which would otherwise be ignored silently."""
    stems = {file.stem for file in image_files(folder)}
    orphans = sorted(shown(file.relative_to(folder)) for stem, file in files.items() if stem not in stems)
    if orphans:
        raise BadInput(
            f"{', '.join(orphans)} in {folder} would be masks of photos that are not there: rename or remove them",
            path=folder,
        )


def _check(photo: Photo, mask: Mask) -> None:
    image = mask.open()
    name = f"{mask.file.name}'s alpha channel" if mask.alpha else f"the mask {mask.file.name}"
    brightest = int(np.asarray(image).max())
    if brightest < FAINT:
        raise BadInput(
            f"{name} is black everywhere (at most {brightest} of 255), so nothing of {photo.path.name} would be "
            "learned: make the subject white"
        )
    (width, height), (photo_width, photo_height) = image.size, photo.size
    if abs(width * photo_height / (height * photo_width) - 1) > SHAPE:
        raise BadInput(
            f"{name} is {width}x{height} but its photo is {photo_width}x{photo_height}: give it the photo's shape"
        )


class Masks:
    """The mask of each crop, at the size of its latents. Call `fill` once before `mask`."""

    def __init__(self, masks: dict[Path, Mask], latent_factor: int, floor: float) -> None:
        self.masks, self.factor, self.floor = masks, latent_factor, floor
        self.entries: dict[Crop, Tensor] = {}

    def fill(self, crops: Sequence[Crop]) -> Masks:
        """Computes the masks of `crops` and returns self. Later changes of the files have no effect.

        Raises:
            BadImage: a mask can't be read.
        """
        for crop in crops:
            if crop.photo.path in self.masks:
                self.entries[crop] = self._make(crop, self.masks[crop.photo.path])
        return self

    def mask(self, crop: Crop) -> Tensor:
        """Returns the loss weight of each latent, [1, h, w] float32 in [floor, 1].

        It is 1 where all pixels of a latent are the subject, and `floor` where none are. Without a mask it is 1.
        """
        if crop in self.entries:
            return self.entries[crop]
        return torch.ones(1, crop.size[1] // self.factor, crop.size[0] // self.factor)

    def _make(self, crop: Crop, mask: Mask) -> Tensor:
        values = np.asarray(crop.cut(_resized(mask, crop.resized)), dtype=np.float32) / 255
        share = avg_pool2d(torch.from_numpy(values)[None], self.factor)
        return self.floor + (1 - self.floor) * share


@lru_cache(maxsize=1)
def _resized(mask: Mask, size: Size) -> Image.Image:
    """Resized like the photo, but with a filter that does not overshoot at edges."""
    return mask.open().resize(size, Image.Resampling.BILINEAR)
