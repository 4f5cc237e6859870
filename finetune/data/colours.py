"""Colours as screens show them: 8-bit RGB; images with another ICC profile (Display P3, Adobe RGB, CMYK) become sRGB.

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


def flat_rgb(upright: Image.Image, ground: str) -> Image.Image:
    """An 8-bit RGB image in sRGB: transparency is put on the colour `ground`; 16-bit and float values are scaled."""
    profile = upright.info.get("icc_profile")
    if upright.mode.startswith(("I", "F")):
        return converted_to_srgb(_scale_deep(upright), profile).convert("RGB")
    if has_alpha(upright):
        layered = upright.convert("RGBA")
        coloured = converted_to_srgb(layered.convert("RGB"), profile).convert("RGBA")
        coloured.putalpha(layered.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", layered.size, ground), coloured).convert("RGB")
    return converted_to_srgb(upright, profile).convert("RGB")


def has_alpha(image: Image.Image) -> bool:
    """Whether an image has transparency."""
    keyed = "transparency" in image.info and not image.mode.startswith(("I", "F"))  # Pillow can't convert those
    return image.mode in ("RGBA", "LA", "PA") or keyed


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


def _scale_deep(image: Image.Image) -> Image.Image:
    """Scales 16-bit integers by their full range and floats by their own range: Pillow's convert would clip both.

    Mode "I" does not say how many bits the file has, so the values decide.
    """
    values = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("F"):
        low, high = float(values.min()), float(values.max())
        values = (values - low) / (high - low) * 255 if high > low else values * 0
    else:
        values = values / (257 if image.mode.startswith("I;16") or values.max() > 255 else 1)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
