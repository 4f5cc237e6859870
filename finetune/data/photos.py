"""A folder -> photos. The one place where picture files are opened, so that each trap is met once."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from finetune.errors import BadInput

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
APPLE = {".heic", ".heif"}


@dataclass(frozen=True)
class Photo:
    """A picture file: `size` is (width, height) after the EXIF rotation, `digest` the SHA-256 of its bytes."""

    path: Path
    size: tuple[int, int]
    digest: str


def picture_files(folder: Path) -> list[Path]:
    """Every picture file in a folder, sorted by name; hidden files are left out."""
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}: give the folder that holds the photos")
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return [file for file in files if file.suffix.lower() in SUFFIXES | APPLE]


def scan(folder: Path) -> list[Photo]:
    """Opens and decodes every picture of a folder once.

    Raises:
        BadInput: no folder, no pictures, or bad files: all of them are named at once.
    """
    files = picture_files(folder)
    if not files:
        raise BadInput(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}): give the folder with the photos")
    photos, bad = [], []
    for file in files:
        fault = fault_of(file)
        if fault is None:
            photos.append(read_photo(file))
        else:
            bad.append(f"{file.name} ({fault})")
    if bad:
        raise BadInput(f"{len(bad)} of {len(files)} files in {folder} can't be used: {', '.join(bad)}; mend or remove them")
    return photos


def fault_of(file: Path) -> str | None:
    """Why a picture can't be used, or None."""
    if file.suffix.lower() in APPLE:
        return "HEIC: convert it to JPEG"
    if file.stat().st_size == 0:
        return "empty file"
    try:
        open_picture(file)
    except Image.DecompressionBombError:
        return "too many pixels"
    except (OSError, SyntaxError, ValueError) as error:
        return f"unreadable: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def read_photo(file: Path) -> Photo:
    content = file.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        sideways = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        width, height = image.size
    return Photo(file, (height, width) if sideways else (width, height), hashlib.sha256(content).hexdigest())


def open_picture(file: Path) -> Image.Image:
    """A file as an upright RGB picture: EXIF rotation applied, transparency on white, 16-bit and float scaled."""
    with Image.open(file) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        return _scale_deep(upright)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layered = upright.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return upright.convert("RGB")


def _scale_deep(image: Image.Image) -> Image.Image:
    """16-bit integers by their range, floats by their own: Pillow's convert would clip both."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("F"):
        low, high = float(values.min()), float(values.max())
        values = (values - low) / (high - low) * 255 if high > low else values * 0
    else:
        values = values / (257 if values.max() > 255 else 1)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
