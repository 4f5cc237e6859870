"""The pictures of the page: small, made of the run folder's own files, and of nothing else on this disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from finetune.core.errors import BadInput
from finetune.core.files import leads_out, replacing
from finetune.data.photos import MAX_ASPECT, BadImage, open_image
from finetune.runs.record import RunRecord

SIDE = 160  # pixels of a picture on the page
SHOWN = 12  # photos of each subject
NO_COPIES = "The run's folder has no copies of its photos: <code>finetune resume RUN</code> makes them."
FORMATS = ("PNG", "JPEG", "WEBP")  # what a run writes, and what browsers are used to


def shown_photos(info: RunRecord) -> list[int]:
    """The numbers, in `info.photos`, of those that the page shows: the first of each subject."""
    counts = [subject.photos for subject in info.subjects] or [len(info.photos)]
    starts = [sum(counts[:number]) for number in range(len(counts))]
    chosen = [range(start, start + min(SHOWN, count)) for start, count in zip(starts, counts, strict=True)]
    return [number for numbers in chosen for number in numbers if number < len(info.photos)]


def copy_of(run: Path, number: int) -> Path:
    """Where the small copy of a photo lies in its run's folder."""
    return run / "photos" / f"{number:04d}.png"


def keep_photos(run: Path, info: RunRecord) -> None:
    """Puts small copies of the photos into the run's folder: a page never opens a path that run.json names."""
    for number in shown_photos(info):
        with replacing(copy_of(run, number)) as temporary:
            small(open_image(Path(info.photos[number]))).save(temporary, format="PNG")


def photo_tags(run: Path, info: RunRecord) -> str:
    """The photos by their names; a run of an older version has no copies of them."""
    files = {number: copy_of(run, number) for number in shown_photos(info)}
    if files and not any(file.is_file() for file in files.values()):
        return f"<p class=soft>{NO_COPIES}</p>"
    return "".join(tag(file, run, Path(info.photos[number]).name) for number, file in files.items() if file.is_file())


def tag(file: Path, run: Path, alt: str) -> str:
    """A picture of the run's folder as an <img>; where it can't be shown, a line that says why."""
    if leads_out(file, run):
        raise BadInput(f"{file} is a link that leads out of {run}: remove it")
    try:
        image = open_image(file, formats=FORMATS)
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise BadImage(file, f"{image.width}x{image.height} is no picture's shape")
    except BadImage as fault:
        return f"<p class=soft>{escape(file.name)} can't be shown ({escape(fault.reason)})</p>"
    return image_tag(image, alt)


def small(image: Image.Image) -> Image.Image:
    """With a shorter side of SIDE pixels; small ones are enlarged smoothly. Nothing but pixels: Pillow would write a
    photo's comment and colour profile into what it saves."""
    scale = SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    shrunk = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    shrunk.info = {}
    return shrunk


def image_tag(image: Image.Image, alt: str) -> str:
    """An <img> with the picture inside."""
    held, shrunk = io.BytesIO(), small(image)
    shrunk.save(held, "JPEG", quality=88)
    data = base64.b64encode(held.getvalue()).decode()
    width, height = shrunk.size
    return (
        f'<img alt="{escape(alt)}" title="{escape(alt)}" width="{width}" height="{height}" '
        f'src="data:image/jpeg;base64,{data}">'
    )


def row(folder: Path, number: int, run: Path) -> str:
    """The first four pictures of a prompt."""
    files: Sequence[Path] = sorted(folder.glob(f"{number:02d}-*.png"))[:4]
    return "".join(tag(file, run, f"seed {file.stem.split('-')[1]}") for file in files)
