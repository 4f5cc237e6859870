"""Colours as screens show them: images with another ICC profile (Display P3, Adobe RGB, CMYK) are converted to sRGB.

An image without a profile is taken as sRGB, as browsers do. One whose profile is sRGB keeps its exact values.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

SAME = 3  # of 255: a profile that moves no colour by more is sRGB under one of its many names
LEVELS = 9  # values of each channel in the colours that are compared
CHANNELS = {"RGB": "RGB", "CMYK": "CMYK", "GRAY": "L", "LAB": "LAB"}  # a profile's colour space -> Pillow's mode


def converted_to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Returns an 8-bit image as sRGB, in mode RGB or L. `profile` is its ICC profile, or None.

    Transparency is not handled here. A profile that is damaged, or of another kind of image, has no effect.
    """
    transform = transform_of(profile) if profile else None
    if transform is None:
        return _lab_to_srgb(image) if image.mode == "LAB" else image
    mode, change = transform
    if image.mode != mode and "CMYK" in (image.mode, mode):
        return image
    from PIL import ImageCms

    ready = image if image.mode == mode else image.convert(mode)
    changed = ImageCms.applyTransform(ready, change)
    assert changed is not None
    return changed


def is_converted(image: Image.Image) -> bool:
    """Whether `converted_to_srgb` changes the values of an image, by the ICC profile that it came with."""
    profile = image.info.get("icc_profile")
    transform = transform_of(profile) if profile else None
    return transform is not None and (image.mode == transform[0] or "CMYK" not in (image.mode, transform[0]))


@lru_cache(maxsize=16)
def transform_of(profile: bytes) -> tuple[str, Any] | None:
    """The mode of the images that an ICC profile describes and Pillow's transform to sRGB; None if it changes nothing
    or can't be used."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = CHANNELS[source.profile.xcolor_space.strip()]
        change = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ImageCms.PyCMSError, KeyError, ValueError, TypeError):
        return None
    return None if _changes_nothing(mode, change) else (mode, change)


def _changes_nothing(mode: str, change: Any) -> bool:
    from PIL import ImageCms

    if mode not in ("RGB", "L"):
        return False
    values = np.linspace(0, 255, LEVELS).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(values, values, values), -1).reshape(LEVELS, -1, 3)
    image = Image.fromarray(np.arange(256, dtype=np.uint8)[None] if mode == "L" else colours)
    changed = ImageCms.applyTransform(image, change)
    assert changed is not None
    moved = np.asarray(image.convert("RGB"), np.int16) - np.asarray(changed, np.int16)
    return int(np.abs(moved).max()) <= SAME


def _lab_to_srgb(image: Image.Image) -> Image.Image:
    """Pillow's own `convert` can't read CIE L*a*b*."""
    from PIL import ImageCms

    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    changed = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    assert changed is not None
    return changed
