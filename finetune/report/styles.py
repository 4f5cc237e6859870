"""The part of the page that only a style has: images with and without the style's words, and how near the drawings."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from PIL import Image

from finetune.core.errors import BadInput
from finetune.core.files import leads_out
from finetune.data.decoding import BadImage, open_image
from finetune.data.photos import MAX_ASPECT
from finetune.report.pictures import FORMATS, copy_of, row, shown_photos
from finetune.report.style_distance import share_of_style
from finetune.runs.record import RunRecord

SMALLEST = 16  # pixels: smaller images have no strokes to measure


def with_and_without(path: Path, info: RunRecord, after: Path) -> str:
    """Returns a section with the images of each prompt beside those of the same prompt without the style's words, at
    the same seeds; empty if the run is no style's, or has no such prompts.

    Args:
        after: the folder with the images after training.
    """
    pairs = info.pairs()
    if not pairs or not after.is_dir():
        return ""
    rows = []
    for number, plain in pairs:
        sides = (_side(info.prompts[each], row(after, each, path)) for each in (number, plain))
        rows.append(f"<div class=pair>{''.join(sides)}</div>")
    return (
        "<h2>With and without the style</h2><p class=soft>After training, at the same seeds: the words "
        f"{' or '.join(f'<b>{escape(name)}</b>' for name in info.names)} should bring the style, and nothing else."
        f"</p><div class=card>{''.join(rows)}{_measured(path, info, after)}</div>"
    )


def _side(prompt: str, images: str) -> str:
    return f"<div><p class=prompt>{escape(prompt)}</p><div class=row>{images}</div></div>"


def _measured(path: Path, info: RunRecord, after: Path) -> str:
    """How far both kinds of images are on the way to the drawings; empty if something is missing, or for several
    styles."""
    styled, without = zip(*info.pairs(), strict=True)
    drawings = _images((copy_of(path, number) for number in shown_photos(info)), path)
    before = _images(_of(path / "samples" / "before", without), path)
    images, plain = (_images(_of(after, numbers), path) for numbers in (styled, without))
    if len(info.names) > 1 or not all((drawings, before, images, plain)):
        return ""
    shares = [f"{share_of_style(each, before, drawings):.0%}" for each in (images, plain)]
    return (
        f"<p>Measured by colours and strokes, from the base's own images of the prompts without the style (0%) to the "
        f"drawings (100%): with the style <b>{shares[0]}</b>, without it <b>{shares[1]}</b>.</p><p class=soft>A rough "
        "number: what the images show counts too, so even other drawings of the same artist would be below 100%.</p>"
    )


def _of(folder: Path, prompts: Iterable[int]) -> list[Path]:
    return [file for number in prompts for file in sorted(folder.glob(f"{number:02d}-*.png"))]


def _images(files: Iterable[Path], run: Path) -> list[Image.Image]:
    """The images that can be read and measured.

    Raises:
        BadInput: a file is a link that leads out of the run folder.
    """
    found = []
    for file in files:
        if leads_out(file, run):
            raise BadInput(f"{file} is a link that leads out of {run}: remove it")
        try:
            image = open_image(file, formats=FORMATS).convert("RGB")
        except BadImage:  # the page says so where it would show it
            continue
        if min(image.size) >= SMALLEST and max(image.size) <= MAX_ASPECT * min(image.size):
            found.append(image)
    return found
