"""The small images in the report. They come only from files inside the run folder."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from finetune.core.errors import BadInput
from finetune.core.files import leads_out, replacing
from finetune.data.decoding import BadImage, open_image
from finetune.data.photos import MAX_ASPECT, Photo
from finetune.runs.record import RunRecord

SIDE = 160  # pixels: the shorter side of an image in the report
SHOWN = 12  # photos of each subject
INPUTS = {"image": "the image", "mask": "the mask: white is painted anew", "depth": "the depth map: near is bright"}
NO_COPIES = "The run's folder has no copies of its photos: <code>finetune resume RUN</code> makes them."
CLASS_IMAGES = "class_images"  # the folder in the run's
OTHER_IMAGES = "other_images"  # of everything else
FORMATS = ("PNG", "JPEG", "WEBP")  # the formats that a run writes and browsers show


def shown_photos(info: RunRecord) -> list[int]:
    """Returns the indices into `info.photos` of the photos in the report: up to SHOWN of each subject."""
    counts = [s.photos if s.listed is None else s.listed for s in info.subjects] or [len(info.photos)]
    starts = [sum(counts[:number]) for number in range(len(counts))]
    chosen = [range(start, start + min(SHOWN, count)) for start, count in zip(starts, counts, strict=True)]
    return [number for numbers in chosen for number in numbers if number < len(info.photos)]


def copy_of(run: Path, number: int) -> Path:
    """Returns the path of the small copy of photo `number` in the run folder."""
    return run / "photos" / f"{number:04d}.png"


def keep_photos(run: Path, info: RunRecord, photos: Sequence[Photo] = ()) -> None:
    """Writes small copies of the photos to the run folder, so that the report never opens a path named in run.json.

    `photos`: those that `info` lists. Of a data set's, copies that are there stay: reading rows would load all of it.
    """
    for number in shown_photos(info):
        held = number < len(photos) and photos[number].stored is not None
        if held and copy_of(run, number).is_file():
            continue
        image = photos[number].open() if held else open_image(Path(info.photos[number]))
        with replacing(copy_of(run, number)) as temporary:
            small(image).save(temporary, format="PNG")


def photo_tags(run: Path, info: RunRecord) -> str:
    """Returns the photos as HTML, or a line that says that the run (of an older version) has no copies of them."""
    files = {number: copy_of(run, number) for number in shown_photos(info)}
    if files and not any(file.is_file() for file in files.values()):
        return f"<p class=soft>{NO_COPIES}</p>"
    return "".join(tag(file, run, Path(info.photos[number]).name) for number, file in files.items() if file.is_file())


def tag(file: Path, run: Path, alt: str, linked: bool = False) -> str:
    """Returns an image file of the run folder as an <img>, or a line that says why it can't be shown.

    `linked`: a click opens the file itself, at full size, as long as the page lies in the run folder.

    Raises:
        BadInput: the file is a link that leads out of the run folder.
    """
    try:
        image = readable(file, run)
    except BadImage as fault:
        return f"<p class=soft>{escape(file.name)} can't be shown ({escape(fault.reason)})</p>"
    shown = image_tag(image, alt)
    return f'<a href="{quote(file.relative_to(run).as_posix())}">{shown}</a>' if linked else shown


def readable(file: Path, run: Path) -> Image.Image:
    """Returns an image file of the run folder.

    Raises:
        BadInput: the file is a link that leads out of the run folder.
        BadImage: it can't be shown.
    """
    if leads_out(file, run):
        raise BadInput(f"{file} is a link that leads out of {run}: remove it")
    image = open_image(file, formats=FORMATS)
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise BadImage(file, f"{image.width}x{image.height} is not a plausible image size")
    return image


def small(image: Image.Image) -> Image.Image:
    """Returns an RGB copy with a shorter side of SIDE pixels. Smaller images are enlarged.

    The copy has no metadata: Pillow would otherwise save a photo's comment and colour profile with it.
    """
    scale = SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    shrunk = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    shrunk.info = {}
    return shrunk


def image_tag(image: Image.Image, alt: str) -> str:
    """Returns an <img> tag with the image data inside."""
    held, shrunk = io.BytesIO(), small(image)
    shrunk.save(held, "JPEG", quality=88)
    data = base64.b64encode(held.getvalue()).decode()
    width, height = shrunk.size
    return (
        f'<img alt="{escape(alt)}" title="{escape(alt)}" width="{width}" height="{height}" '
        f'src="data:image/jpeg;base64,{data}">'
    )


def row(folder: Path, number: int, run: Path, linked: bool = False, most: int = 4) -> str:
    """Returns the first `most` images of prompt `number` as HTML, from the smallest seed on."""
    files: Sequence[Path] = sorted(folder.glob(f"{number:02d}-*.png"), key=seed_in)[:most]
    return "".join(tag(file, run, f"seed {file.stem.split('-', 1)[1]}", linked) for file in files)


def seed_in(file: Path) -> int:
    """Returns the seed in the name of an image; -1 for a file of another name."""
    seed = file.stem.split("-", 1)[-1]
    return int(seed) if seed.removeprefix("-").isdecimal() else -1


def keep_class_images(run: Path, files: Sequence[Path], name: str = CLASS_IMAGES) -> None:
    """Writes small copies of the first images to a folder `name` in the run's: they are in a cache that may be
    emptied."""
    for number, file in enumerate(files[:SHOWN]):
        with replacing(run / name / f"{number:04d}.png") as temporary:
            small(open_image(file)).save(temporary, format="PNG")


def class_image_tags(run: Path, name: str = CLASS_IMAGES) -> str:
    """Returns the small copies of class images as HTML; empty if the run has none."""
    alt = {CLASS_IMAGES: "class image", OTHER_IMAGES: "image of everything else"}[name]
    return "".join(tag(file, run, alt) for file in sorted((run / name).glob("*.png"))[:SHOWN])


def input_tags(folder: Path, run: Path) -> str:
    """Returns what a folder's images were drawn from (image, mask, depth map) as HTML; empty if prompts alone."""
    files = {folder / f"input-{name}.png": alt for name, alt in INPUTS.items()}
    return "".join(tag(file, run, alt) for file, alt in files.items() if file.is_file())
