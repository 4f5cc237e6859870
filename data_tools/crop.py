"""Writes a folder of photos that are cropped around their subject, for a base's size. The subject is never cut."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from data_tools.for_base import add_base, add_detector, base_and_resolution, detector_of
from data_tools.geometry import SAVED, Cut, Format, cut_step
from data_tools.photo_set import Entry, PhotoSet, read_set
from data_tools.show import add_folders, say_prepared
from data_tools.subject import EDGES, Subject, find_subject
from data_tools.work import Plan, Prepared, Step, carry_out, kept, refuse_place, steps_of
from finetune.core.errors import BadInput
from finetune.data.blobs import Box
from finetune.data.buckets import Size, bucket_table, mismatch
from finetune.data.decoding import BadImage
from finetune.data.photos import read_image

if TYPE_CHECKING:
    from data_tools.vision import Detector

Shape = Literal["square", "buckets"]
Pixels = tuple[int, int, int, int]  # left, top, right, bottom
COARSE, FINE = 64, 8  # pixels: buckets' sides are multiples of it, from a resolution of 512 on and below


@dataclass(frozen=True)
class CropRules:
    """How photos are cropped.

    `resolution` is the base's in pixels. `shape`: a square, or the size near a photo's own shape that
    `data.shape=buckets` trains on. `margin`: None keeps as much of the photo as the shape allows; a number goes nearer
    to the subject, and leaves that share of its sides around it. `saved` is png (without loss), jpg (quality 95) or
    webp (without loss).
    """

    resolution: int
    shape: Shape = "square"
    margin: float | None = None
    saved: Format = "png"


def crop(
    source: Path, out: Path, rules: CropRules, detector: Detector | None = None, dry_run: bool = False
) -> Prepared:
    """Writes the photos of `source` to the new folder `out`, each cropped around its subject.

    The subject is where the photo's mask file says, or else its alpha channel, the `detector` if there is one, or its
    colours. A photo whose subject was not found, or would be cut by every such crop, is copied as it is and named.
    Nothing is enlarged. Masks and companions are cropped with their photo.

    Raises:
        BadInput: there are no photos, a rule is out of range, or `out` can't be written.
    """
    _check(rules)
    refuse_place(source, out)
    photos = read_set(source)
    sizes = _sizes(rules)
    steps = steps_of(photos, lambda entry: _step(photos, entry, rules, sizes, detector))
    whole = sum(step.action == "not cropped" for step in steps)
    notes = photos.notes
    if whole:
        notes += (f"{whole} of {len(steps)} photos were not cropped, and training would crop them at the middle",)
    return carry_out(Plan("crop", source, steps, asdict(rules), notes), out, dry_run)


def _check(rules: CropRules) -> None:
    if rules.saved not in SAVED:
        raise BadInput(f"the format {rules.saved!r} is unknown: use {', '.join(SAVED)}")
    if rules.margin is not None and not 0 <= rules.margin <= 5:
        raise BadInput(f"the margin {rules.margin:g} is out of range: give 0 to 5, such as 0.2 for a fifth")


def _sizes(rules: CropRules) -> list[Size]:
    """The sizes (width, height) in pixels that a crop may have for training."""
    if rules.shape == "square":
        return [(rules.resolution, rules.resolution)]
    return bucket_table(rules.resolution, COARSE if rules.resolution >= 8 * COARSE else FINE)


def _step(photos: PhotoSet, entry: Entry, rules: CropRules, sizes: Sequence[Size], detector: Detector | None) -> Step:
    try:
        _, image = read_image(entry.path)
        subject = find_subject(entry, image, detector)
    except BadImage as fault:
        return Step(entry.path, "left out", fault.reason)
    if subject.why_not:
        return kept(photos, entry, "not cropped", subject.why_not)
    chosen = choose(image.size, subject.box, sizes, rules.margin)
    if chosen is None:
        return kept(photos, entry, "not cropped", _too_long(subject, image, rules))
    window, size = chosen
    now = size if window[2] - window[0] > size[0] else (window[2] - window[0], window[3] - window[1])
    if window == (0, 0, *image.size) and now == image.size:
        return kept(photos, entry, why="nothing to cut")
    cut = Cut(_shares(window, image.size), now)
    return cut_step(photos, entry, cut, rules.saved, ("cropped", _told(subject, image.size, window, (now, size))))


def choose(size: Size, box: Box, sizes: Sequence[Size], margin: float | None) -> tuple[Pixels, Size] | None:
    """Returns the part of a photo of `size` to keep, in pixels, and which of the training `sizes` it is for.

    It holds the whole `box`, with the box's centre as near to its own as the photo allows. Of several sizes the one
    nearest to the photo's shape (with a margin: to the box's) is taken. None: every one would cut the box.
    """
    width, height = size
    left, top, right, bottom = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    shape = size if margin is None else (max(1, round(right - left)), max(1, round(bottom - top)))
    for target in sorted(sizes, key=lambda each: (mismatch(shape, each), mismatch((1, 1), each), each)):
        scale = min(width / target[0], height / target[1])
        needed = max((right - left) / target[0], (bottom - top) / target[1])
        if needed > scale + 1e-9:
            continue
        if margin is not None:
            scale = min(scale, max(needed * (1 + 2 * margin), 1.0))
        sides = min(width, round(target[0] * scale)), min(height, round(target[1] * scale))
        start = _start((left, right), sides[0], width), _start((top, bottom), sides[1], height)
        return (*start, start[0] + sides[0], start[1] + sides[1]), target
    return None


def _start(span: tuple[float, float], side: int, length: int) -> int:
    """Where a window of `side` pixels begins that has the span's middle in its own, inside of 0 to `length`."""
    return min(max(round((span[0] + span[1] - side) / 2), 0), length - side)


def _shares(window: Pixels, size: Size) -> Box:
    left, top, right, bottom = window
    return left / size[0], top / size[1], right / size[0], bottom / size[1]


def _told(subject: Subject, size: Size, window: Pixels, sizes: tuple[Size, Size]) -> str:
    """What was cut, by how much it was made smaller, and where the subject is."""
    now, wanted = sizes
    away = (window[0] / size[0], window[1] / size[1], 1 - window[2] / size[0], 1 - window[3] / size[1])
    parts = [f"{share:.0%} {edge}" for share, edge in zip(away, EDGES, strict=True) if share >= 0.005]
    told = [f"cut: {', '.join(parts) or 'nothing'}", f"{size[0]}x{size[1]} to {now[0]}x{now[1]}"]
    if now != wanted:
        told.append(f"smaller than {wanted[0]}x{wanted[1]}, which training will enlarge it to")
    told.append(f"the subject, by {subject.by}, has a box of {subject.area:.0%} of the photo")
    if subject.cut:
        told.append(f"and ends at the photo's {' and '.join(subject.cut)} edge")
    return "; ".join(told)


def _too_long(subject: Subject, image: Image.Image, rules: CropRules) -> str:
    """Why no crop holds the subject: how much of it a crop would keep at most."""
    left, top, right, bottom = subject.box
    width, height = (right - left) * image.width, (bottom - top) * image.height
    side = min(image.size)
    share = min(1.0, side / width) * min(1.0, side / height)
    hint = "; --shape buckets may hold it" if rules.shape == "square" else ""
    return f"a crop would keep at most {share:.0%} of the subject's {width:.0f}x{height:.0f} pixels{hint}"


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `crop`."""
    add_folders(parser)
    add_base(parser, token=False)
    parser.add_argument(
        "--shape", choices=("square", "buckets"), default="square", help="as data.shape of a recipe (default: square)"
    )
    parser.add_argument(
        "--margin",
        type=float,
        metavar="SHARE",
        help="go near to the subject, and leave this share of its sides around it; without it, as little as the shape "
        "allows is cut",
    )
    parser.add_argument("--format", choices=tuple(SAVED), default="png", help="file format of the cropped photos")
    add_detector(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    _, resolution, _ = base_and_resolution(options)
    rules = CropRules(resolution, options.shape, options.margin, options.format)
    return say_prepared(crop(options.photos, options.out, rules, detector_of(options), options.dry_run), options.json)
