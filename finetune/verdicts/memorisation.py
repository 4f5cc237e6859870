"""Whether images are copies of training photos: the nearest photo of each, against the distances between photos.

Two distances must agree, because each alone is fooled: latents by a shared background, the hash by a shared layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

SIDE = 8  # of the hash: 64 bits
NEAR = 0.5  # a copy is nearer to its photo than this share of the usual distance between photos
ALIKE = 10 / 64  # where there is one photo: the bits by which near-duplicates usually differ (Krawetz, "dHash", 2013)
ALIKE_LATENTS = 0.35  # and the share of the latents' own spread


@dataclass(frozen=True)
class Nearest:
    """The photo nearest to an image. `hash` is the share of bits that differ; `latents` the root mean square
    difference in units of the photos' spread."""

    image: str
    photo: int
    hash: float
    latents: float
    copied: bool


@dataclass(frozen=True)
class Memorisation:
    """`nearest` of each image. `hash` and `latents`: the usual distance from a photo to the nearest other one."""

    nearest: Sequence[Nearest]
    hash: float
    latents: float

    @property
    def copies(self) -> int:
        return sum(item.copied for item in self.nearest)

    @property
    def sentence(self) -> str:
        count = len(self.nearest)
        if not self.copies:
            return f"None of {count} images is a copy of a training photo."
        return f"{self.copies} of {count} images are close to copies of a training photo."


@dataclass(frozen=True)
class PhotoLatents:
    """Images and their latents [N, C, h, w]."""

    images: Sequence[Image.Image]
    latents: Tensor


def memorised(drawn: Mapping[str, Image.Image], latents: Tensor, photos: PhotoLatents) -> Memorisation:
    """Compares each drawn image, by its name, with every photo and with its mirror image.

    Args:
        drawn: name -> image.
        latents: [N, C, h, w] of the drawn images, in their order.
        photos: the training photos, cropped as the images are.
    """
    mirrored = PhotoLatents([ImageOps.mirror(image) for image in photos.images], photos.latents.flip(-1))
    spread = float(photos.latents.std()) or 1.0
    both = [_distances(list(drawn.values()), latents, side, spread) for side in (photos, mirrored)]
    hashes, spaces = (np.minimum(*each) for each in zip(*both, strict=True))
    own_hash, own_latents = _between(photos, spread)
    nearest = []
    for number, name in enumerate(drawn):
        photo = int((hashes[number] / own_hash + spaces[number] / own_latents).argmin())
        near, space = float(hashes[number, photo]), float(spaces[number, photo])
        copied = near < NEAR * own_hash and space < NEAR * own_latents
        nearest.append(Nearest(name, photo, round(near, 4), round(space, 4), copied))
    return Memorisation(nearest, round(own_hash, 4), round(own_latents, 4))


def difference_hash(image: Image.Image) -> NDArray[np.bool_]:
    """[64]: whether each pixel of the image at 9x8 is brighter than its left neighbour (dHash)."""
    grey = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX), dtype=np.int16)
    bits: NDArray[np.bool_] = (grey[:, 1:] > grey[:, :-1]).ravel()
    return bits


def _distances(
    images: Sequence[Image.Image], latents: Tensor, photos: PhotoLatents, spread: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[images, photos] each: by hash and by latents."""
    one, other = (np.stack([difference_hash(image) for image in each]) for each in (images, photos.images))
    hashes = (one[:, None] != other[None]).mean(2)
    squares = torch.stack([(photos.latents - each).square().flatten(1).mean(1) for each in latents])
    return hashes, (squares.sqrt() / spread).double().numpy()


def _between(photos: PhotoLatents, spread: float) -> tuple[float, float]:
    """The median over photos of the distance to the nearest other photo; for one photo, what is usual."""
    if len(photos.images) < 2:
        return ALIKE / NEAR, ALIKE_LATENTS / NEAR
    found = []
    for distances in _distances(photos.images, photos.latents, photos, spread):
        np.fill_diagonal(distances, np.inf)
        found.append(float(np.median(distances.min(1))))
    return max(found[0], ALIKE), max(found[1], 1e-6)
