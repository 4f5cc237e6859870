"""Whether images are copies of training photos: the nearest photo of each, against the distances between photos.

Two distances must agree, because each alone is fooled: latents by a shared background, the hash by a shared layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

Bits = NDArray[np.bool_]
Distances = NDArray[np.float64]
SIDE = 8  # of the hash: 64 bits
TOGETHER = 4096  # values of each image's latents in one product
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
    """Images by their hashes [N, 64], the hashes of their mirror images, and their latents [N, C, h, w]."""

    hashes: Bits
    mirrored: Bits
    latents: Tensor


def photo_latents(pairs: Iterable[tuple[Image.Image, Tensor]]) -> PhotoLatents:
    """Reads images and their latents [C, h, w] one after another: only one image is in memory at a time."""
    hashes, mirrored, latents = [], [], []
    for image, latent in pairs:
        hashes.append(difference_hash(image))
        mirrored.append(difference_hash(ImageOps.mirror(image)))
        latents.append(latent)
    return PhotoLatents(np.stack(hashes), np.stack(mirrored), torch.stack(latents))


def memorised(names: Sequence[str], drawn: PhotoLatents, photos: PhotoLatents) -> Memorisation:
    """Compares each drawn image with every photo and with its mirror image.

    Args:
        names: of the drawn images.
        photos: the training photos, cropped as the images are.
    """
    different = _different(photos)
    spread = float(different.latents.std()) or 1.0
    hashes = np.minimum(*(_hash_distances(drawn.hashes, each) for each in (photos.hashes, photos.mirrored)))
    sides = (photos.latents, photos.latents.flip(-1))
    spaces = np.minimum(*(_latent_distances(drawn.latents, each) / spread for each in sides))
    own_hash, own_latents = _between(different, spread)
    nearest = []
    for number, name in enumerate(names):
        photo = int((hashes[number] / own_hash + spaces[number] / own_latents).argmin())
        near, space = float(hashes[number, photo]), float(spaces[number, photo])
        copied = near < NEAR * own_hash and space < NEAR * own_latents
        nearest.append(Nearest(name, photo, round(near, 4), round(space, 4), copied))
    return Memorisation(nearest, round(own_hash, 4), round(own_latents, 4))


def difference_hash(image: Image.Image) -> Bits:
    """[64]: whether each pixel of the image at 9x8 is brighter than its left neighbour (dHash)."""
    grey = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX), dtype=np.int16)
    bits: Bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    return bits


def _hash_distances(one: Bits, other: Bits) -> Distances:
    """[N, M]: the share of bits that differ, between hashes [N, 64] and [M, 64]."""
    return np.stack([(bits != other).mean(1) for bits in one])


def _latent_distances(one: Tensor, other: Tensor) -> Distances:
    """[N, M]: the root mean square differences between latents [N, ...] and [M, ...].

    By |a - b|^2 = |a|^2 + |b|^2 - 2 ab, in float64: 2,000 photos of SDXL with each other are one product, and not
    2,000 passes over 500 MB. Some values at a time, so that there is no second copy of all.
    """
    flat = one.flatten(1), other.flatten(1)
    squares = torch.zeros(len(one), len(other), dtype=torch.float64)
    for start in range(0, flat[0].shape[1], TOGETHER):
        a, b = (each[:, start : start + TOGETHER].double() for each in flat)
        squares += a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * (a @ b.T)
    found: Distances = (squares.clamp(min=0) / flat[0].shape[1]).sqrt().numpy()
    return found


def _different(photos: PhotoLatents) -> PhotoLatents:
    """Without near-duplicates, such as the shots of a burst: of these the first stays.

    Half of the distance between two shots is less than what a VAE changes: no image would be a copy of them.
    """
    spread = float(photos.latents.std()) or 1.0
    bits = _hash_distances(photos.hashes, photos.hashes) <= ALIKE
    alike = bits & (_latent_distances(photos.latents, photos.latents) / spread <= ALIKE_LATENTS)
    kept: list[int] = []
    for number in range(len(alike)):
        if not alike[number, kept].any():
            kept.append(number)
    return PhotoLatents(photos.hashes[kept], photos.mirrored[kept], photos.latents[kept])


def _between(photos: PhotoLatents, spread: float) -> tuple[float, float]:
    """The median over photos of the distance to the nearest other photo; for one photo, what is usual."""
    if len(photos.hashes) < 2:
        return ALIKE / NEAR, ALIKE_LATENTS / NEAR
    found = []
    both = _hash_distances(photos.hashes, photos.hashes), _latent_distances(photos.latents, photos.latents) / spread
    for distances in both:
        np.fill_diagonal(distances, np.inf)
        found.append(float(np.median(distances.min(1))))
    return max(found[0], ALIKE), max(found[1], 1e-6)
