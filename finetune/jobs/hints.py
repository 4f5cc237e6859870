"""Hints before a run: photos whose subject the training crop would cut, or whose subject is small, and what first runs
often get wrong.

Those of photos come from mask files, or from small copies (`finetune.data.saliency`), so that they take moments.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.data.blobs import Box, box_of, share_in_square
from finetune.data.decoding import BadImage, open_image, opened
from finetune.data.photos import image_files, mask_beside
from finetune.data.saliency import QUICK, salient_box, shrunk
from finetune.optim.base import WHOLE

MOST = 24  # photos: of more none is looked at
SMALL = 0.06  # of a photo's area: training at 512 pixels shows such a subject with about 125
WHITE = 127  # of 255: from here on a mask says subject
NAMED = 5  # photos
FEWEST = 3  # photos of a subject
ARTICLE = re.compile(r"(an?|the|my)\s", re.IGNORECASE)


def photo_hints(recipe: Recipe) -> list[str]:
    """What a first run often gets wrong, and a line about each photo that `finetune data crop` or `finetune data mask`
    would help; [] if none is known.

    Nothing is said of photos that are not in a folder of their own, or of more than 24.
    """
    square = recipe.data.shape == "square" and recipe.data.crop == "center"
    try:
        found = subject_hints(recipe)
        files = [file for subject in recipe.data.all_subjects for file in _files(subject.photos)]
    except (BadInput, OSError):  # the run itself says what is wrong with them
        return []
    for file in files if len(files) <= MOST else []:
        marked = mask_beside(file)
        box = _box(file, marked)
        if box is not None:
            found += _said(file.name, box, _size(file), square, masked=marked is not None)
    more = [f"and {len(found) - NAMED} more"] if len(found) > NAMED else []
    return found[:NAMED] + more


def subject_hints(recipe: Recipe) -> list[str]:
    """What a first run often gets wrong: an article in the class noun, one or two photos, steps at a learning rate of
    0. Opens no photo."""
    said = _idle_steps(recipe)
    for subject in recipe.data.all_subjects:
        article = ARTICLE.match(subject.class_noun or "")
        if article:
            said.append(f"data.class_noun is {subject.class_noun!r}: leave {article[1]!r} out, prompts have an 'a'")
        count = _count(subject.photos) if recipe.data.thing == "subject" else FEWEST
        if 0 < count < FEWEST:
            said.append(
                f"{count} photo{'s' * (count > 1)} of {subject.photos.name}: take three to ten, in other places"
            )
    return said


def _idle_steps(recipe: Recipe) -> list[str]:
    """A run that goes on after its schedule has come to 0."""
    steps, moving = recipe.run.steps, recipe.optim.steps_within(WHOLE, recipe.run.steps)
    if moving == steps:
        return []
    return [
        f"steps {moving + 1} to {steps} have a learning rate of 0, as optim.schedule_steps is {moving}: leave it out, "
        f"or set run.steps={moving}"
    ]


def _count(photos: Path) -> int:
    try:
        return len(_files(photos))
    except (BadInput, OSError):  # the run itself says what is wrong with them
        return 0


def _files(photos: Path) -> list[Path]:
    return image_files(photos) if photos.is_dir() else []


def _box(file: Path, marked: Path | None) -> Box | None:
    try:
        if marked is not None:
            return box_of(np.asarray(open_image(marked, "black").convert("L")) > WHITE)
        return salient_box(thumbnail(file))
    except BadImage:
        return None


def thumbnail(file: Path) -> Image.Image:
    """A small upright RGB copy of a photo. A JPEG is decoded at a fraction of its size.

    Raises:
        BadImage: it can't be read.
    """
    with opened(file, file.read_bytes()) as image:
        if image.format != "JPEG":
            return shrunk(open_image(file), QUICK)
        image.draft("RGB", (2 * QUICK, 2 * QUICK))
        return shrunk(ImageOps.exif_transpose(image).convert("RGB"), QUICK)


def _size(file: Path) -> tuple[int, int]:
    with opened(file, file.read_bytes()) as image:
        turned = image.getexif().get(0x0112, 1) >= 5
        return (image.height, image.width) if turned else image.size


def _said(name: str, box: Box, size: tuple[int, int], square: bool, masked: bool) -> list[str]:
    kept = share_in_square(box, size) if square else 1.0
    if kept < 1:
        return [f"{name}: the square crop at the middle keeps {kept:.0%} of its subject; finetune data crop moves it"]
    area = (box[2] - box[0]) * (box[3] - box[1])
    if area >= SMALL:
        return []
    mask = "" if masked else ", and finetune data mask keeps the rest out of the loss"
    return [f"{name}: its subject fills {area:.0%} of it; finetune data crop --margin 0.3 goes nearer{mask}"]
