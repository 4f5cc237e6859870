"""Cuts and resizes a photo and, in the same way, its masks and other companions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.photo_set import Entry, PhotoSet, is_mask
from data_tools.work import Step, Writer, Written, companion_name, in_list
from finetune.data.buckets import Size
from finetune.data.decoding import alpha_channel, open_image, open_values
from finetune.data.photos import MASK

Format = str  # "png", "jpg" or "webp"
SAVED: dict[str, tuple[str, dict[str, object]]] = {
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    "webp": ("WEBP", {"lossless": True}),
}


@dataclass(frozen=True)
class Cut:
    """What becomes of a photo's pixels: `box` (left, top, right, bottom) as shares of its sides is resized to `size`
    (width, height) in pixels."""

    box: tuple[float, float, float, float]
    size: Size

    def of(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """Returns the cut of an image, which may be larger or smaller than the photo."""
        left, top, right, bottom = self.box
        pixels = (left * image.width, top * image.height, right * image.width, bottom * image.height)
        return image.resize(self.size, resample, box=pixels, reducing_gap=None)


WHOLE = (0.0, 0.0, 1.0, 1.0)


def cut_step(photos: PhotoSet, entry: Entry, cut: Cut, saved: Format, about: tuple[str, str]) -> Step:
    """A step that writes a photo's cut, upright and in sRGB, with its masks and companions cut in the same way.

    `about` is the step's action and reason. An alpha channel becomes a mask file, as training would read it.
    """
    stem = entry.path.stem
    files = [Written(f"{stem}.{saved}", entry.path, _photo_writer(entry.path, cut, saved))]
    files += [Written(f"{stem}{file.suffix}", file) for file in entry.beside]
    files += [Written(companion_name(file, entry, stem), file) for file in entry.further]
    has_mask = False
    for file in entry.companions:
        has_mask |= is_mask(file)
        name = str(Path(companion_name(file, entry, stem)).with_suffix(".png").as_posix())
        files.append(Written(name, file, _companion_writer(file, cut)))
    if not has_mask and _alpha(entry.path) is not None:
        files.append(Written(f"{stem}{MASK}", entry.path, _alpha_writer(entry.path, cut)))
    return Step(entry.path, about[0], about[1], tuple(files), in_list(photos, entry), entry.row)


def save(image: Image.Image, path: Path, saved: Format) -> None:
    """Writes an image without metadata: no place, no camera, no profile (it is sRGB)."""
    kind, settings = SAVED[saved]
    plain = Image.new(image.mode, image.size)
    plain.paste(image)
    plain.save(path, kind, **settings)


def _photo_writer(file: Path, cut: Cut, saved: Format) -> Writer:
    return lambda path: save(cut.of(open_image(file), Image.Resampling.LANCZOS), path, saved)


def _companion_writer(file: Path, cut: Cut) -> Writer:
    if is_mask(file):  # a filter that does not overshoot at edges
        return lambda path: save(
            cut.of(open_image(file, "black").convert("L"), Image.Resampling.BILINEAR), path, "png"
        )
    if ".depth." in file.name:
        return lambda path: _write_depth(file, cut, path)
    return lambda path: save(cut.of(open_image(file), Image.Resampling.LANCZOS), path, "png")


def _write_depth(file: Path, cut: Cut, path: Path) -> None:
    values = open_values(file)
    deep = float(values.max()) > 255
    resized = np.asarray(cut.of(Image.fromarray(values), Image.Resampling.BILINEAR)).round()
    Image.fromarray(resized.clip(0, 65535).astype(np.uint16 if deep else np.uint8)).save(path, "PNG")


def _alpha(file: Path) -> Image.Image | None:
    channel = alpha_channel(file)
    return channel if channel is not None and channel.getextrema() != (255, 255) else None


def _alpha_writer(file: Path, cut: Cut) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        channel = alpha_channel(file)
        assert channel is not None
        save(cut.of(channel, Image.Resampling.BILINEAR), path, "png")

    return write
