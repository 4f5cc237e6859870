"""Writes a folder of photos of a base's size: upright, in sRGB, without metadata."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from data_tools.for_base import add_base, base_and_resolution
from data_tools.geometry import SAVED, WHOLE, Cut, Format, cut_step
from data_tools.photo_set import Entry, PhotoSet, read_set
from data_tools.show import add_folders, say_prepared
from data_tools.work import Plan, Prepared, Step, carry_out, kept, refuse_place, steps_of
from finetune.core.errors import BadInput
from finetune.data.buckets import Size
from finetune.data.decoding import BadImage
from finetune.data.photos import read_photo

Side = Literal["shorter", "longer"]


def resize(
    source: Path, out: Path, resolution: int, side: Side = "shorter", saved: Format = "png", dry_run: bool = False
) -> Prepared:
    """Writes the photos of `source` to the new folder `out`, their shorter (or longer) side `resolution` pixels long.

    Nothing is enlarged: a photo that is not larger is copied as it is. Masks and companions are resized with their
    photo. `saved` is png (without loss), jpg (quality 95) or webp (without loss).

    Raises:
        BadInput: there are no photos, `saved` is unknown, or `out` can't be written.
    """
    if saved not in SAVED:
        raise BadInput(f"the format {saved!r} is unknown: use {', '.join(SAVED)}")
    refuse_place(source, out)
    photos = read_set(source)
    steps = steps_of(photos, lambda entry: _step(photos, entry, resolution, side, saved))
    settings = {"resolution": resolution, "side": side, "format": saved}
    return carry_out(Plan("resize", source, steps, settings, photos.notes), out, dry_run)


def smaller(size: Size, resolution: int, side: Side) -> Size | None:
    """Returns the new (width, height) in pixels, or None if the photo is not larger."""
    length = min(size) if side == "shorter" else max(size)
    if length <= resolution:
        return None
    width, height = (max(1, round(number * resolution / length)) for number in size)
    return width, height


def _step(photos: PhotoSet, entry: Entry, resolution: int, side: Side, saved: Format) -> Step:
    try:
        photo = read_photo(entry.path)
    except BadImage as fault:
        return Step(entry.path, "left out", fault.reason)
    size = smaller(photo.size, resolution, side)
    if size is None:
        return kept(photos, entry, why="not larger")
    was, now = ("x".join(map(str, each)) for each in (photo.size, size))
    return cut_step(photos, entry, Cut(WHOLE, size), saved, ("resized", f"{was} to {now}"))


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `resize`."""
    add_folders(parser)
    add_base(parser, token=False)
    parser.add_argument("--side", choices=("shorter", "longer"), default="shorter", help="which side gets that length")
    parser.add_argument("--format", choices=tuple(SAVED), default="png", help="file format of the resized photos")


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    _, resolution, _ = base_and_resolution(options)
    done = resize(options.photos, options.out, resolution, options.side, options.format, options.dry_run)
    return say_prepared(done, options.json)
