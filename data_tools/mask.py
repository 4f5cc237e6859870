"""Writes a folder of photos with a mask of the subject beside each, as training reads it (`data.masks`)."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data_tools.geometry import save
from data_tools.photo_set import Entry, PhotoSet, is_mask, read_set
from data_tools.segment import resized, segment
from data_tools.show import add_folders, say_prepared
from data_tools.subject import marked_subject, without_bars
from data_tools.work import Plan, Prepared, Step, Written, carry_out, kept, refuse_place, steps_of
from finetune.core.errors import BadInput
from finetune.data.decoding import BadImage, open_image
from finetune.data.photos import MASK, read_image
from finetune.data.saliency import shrunk

if TYPE_CHECKING:
    from data_tools.vision import Segmenter

RADIUS = 4  # pixels of the small mask: how far the photo's edges may move the mask's
EVEN = 1e-3  # of squared luma from 0 to 1: surfaces with less contrast are even
UNCLEAR = "its colours do not tell subject from background"


@dataclass(frozen=True)
class MaskMade:
    """A photo's mask, small: `values` [height, width] float32 in [0, 1] for the part `inner` of the photo (left, top,
    right, bottom in pixels), or None and `why_not`."""

    values: np.ndarray | None
    inner: tuple[int, int, int, int]
    why_not: str = ""


def mask(
    source: Path, out: Path, segmenter: Segmenter | None = None, unsure: bool = False, dry_run: bool = False
) -> Prepared:
    """Copies the photos of `source` to the new folder `out` and writes NAME.mask.png beside each, white on black.

    Without a `segmenter` the photo's colours decide. Where they do not tell subject from background, no mask is
    written, unless `unsure` asks for it. A photo that has a mask, or is transparent in parts, is copied as it is.

    Raises:
        BadInput: there are no photos, two of them share a name, or `out` can't be written.
    """
    refuse_place(source, out)
    photos = read_set(source)
    _refuse_same_names(photos)
    steps = steps_of(photos, lambda entry: _step(photos, entry, segmenter, unsure))
    used = {} if segmenter is None else {"model": segmenter.folder.name, "find": segmenter.names}
    settings = {**used, "unsure": unsure}
    without = sum(step.action == "no mask" for step in steps)
    notes = photos.notes
    if without:
        notes += (f"{without} of {len(steps)} photos got no mask: training learns from all of them",)
    return carry_out(Plan("mask", source, steps, settings, notes), out, dry_run)


def _refuse_same_names(photos: PhotoSet) -> None:
    stems = [entry.path.stem for entry in photos.entries]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise BadInput(f"several photos are called {twice[0]!r}, and a mask belongs to one: rename them")


def _step(photos: PhotoSet, entry: Entry, segmenter: Segmenter | None, unsure: bool) -> Step:
    try:
        if any(is_mask(file) for file in entry.companions) or marked_subject(entry) is not None:
            return kept(photos, entry, why="it has a mask or is transparent in parts")
        _, image = read_image(entry.path)
    except BadImage as fault:
        return Step(entry.path, "left out", fault.reason)
    made = make_mask(image, segmenter, unsure)
    if made.values is None:
        return kept(photos, entry, "no mask", made.why_not)
    values = made.values
    step = kept(photos, entry, "masked", f"white is {values.mean():.0%} of the photo{_doubt(made)}")
    name = f"{entry.path.stem}{MASK}"
    written = Written(name, entry.path, lambda path: save(full_mask(open_image(entry.path), made), path, "png"))
    return Step(step.source, step.action, step.why, (*step.files, written), step.caption, step.row)


def _doubt(made: MaskMade) -> str:
    return f"; doubtful: {made.why_not}" if made.why_not else ""


def make_mask(image: Image.Image, segmenter: Segmenter | None = None, unsure: bool = False) -> MaskMade:
    """The small mask of an upright RGB photo. With `unsure`, one that can't be relied on is given too."""
    whole = (0, 0, *image.size)
    if segmenter is not None:
        values = segmenter.mask(image)
        missed = values is None or float(values.max()) < 0.5
        return MaskMade(None if missed else values, whole, "the segmenter finds nothing" if missed else "")
    inner = without_bars(image)
    found = segment(image.crop(inner))
    why_not = "" if found.clear else UNCLEAR
    given = found.clear or (unsure and bool((found.mask > 0.5).any()))
    return MaskMade(found.mask if given else None, inner, why_not)


def full_mask(image: Image.Image, made: MaskMade) -> Image.Image:
    """The mask of a photo in its own size, 8-bit grey, with the photo's edges."""
    assert made.values is not None
    part = image.crop(made.inner)
    gain, offset = guided(_luma(shrunk(part, max(made.values.shape))), made.values)
    values = resized(gain, part.size) * _luma(part) + resized(offset, part.size)
    result = Image.new("L", image.size, 0)
    result.paste(Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8)), made.inner[:2])
    return result


def _luma(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), dtype=np.float32) / 255


def guided(luma: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The guided filter's (He et al. 2010) linear map from luma to mask around each pixel: gain and offset, [h, w].

    They are made small and enlarged, as in He and Sun 2015, "Fast Guided Filter".
    """
    if luma.shape != values.shape:
        luma = resized(luma, (values.shape[1], values.shape[0]))
    mean, mean_values = _box(luma), _box(values)
    gain = (_box(luma * values) - mean * mean_values) / (_box(luma * luma) - mean**2 + EVEN)
    return _box(gain), _box(mean_values - gain * mean)


def _box(values: np.ndarray) -> np.ndarray:
    """The mean of the square around each pixel, with edges repeated."""
    size = 2 * RADIUS + 1
    padded = np.pad(values, RADIUS, mode="edge").astype(np.float64)
    sums = np.pad(padded.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    total = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    return np.asarray(total / size**2, dtype=np.float32)


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `mask`."""
    add_folders(parser)
    parser.add_argument("--model", metavar="FOLDER|ID", help="a segmenter that transformers reads")
    parser.add_argument(
        "--find", action="append", default=[], metavar="NAME", help="the subject's class, such as dog; again for more"
    )
    parser.add_argument(
        "--allow-code", action="store_true", help="run the Python code that comes with --model, such as BiRefNet's"
    )
    parser.add_argument("--unsure", action="store_true", help="write masks that can't be relied on too")


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if options.model is None and (options.find or options.allow_code):
        raise BadInput("--find and --allow-code say how --model is used: give one")
    done = mask(options.photos, options.out, _segmenter(options), options.unsure, options.dry_run)
    return say_prepared(done, options.json)


def _segmenter(options: argparse.Namespace) -> Segmenter | None:
    if options.model is None:
        return None
    from finetune.core.logging import quiet_import

    with quiet_import():
        from data_tools.vision import Segmenter
    return Segmenter(options.model, options.find, options.allow_code)
