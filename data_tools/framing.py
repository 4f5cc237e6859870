"""What the photo's edges, or the square crop of training, cut off: the subject, a face."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data_tools.subject import WHITE, Subject
from finetune.data.blobs import box_of, share_in_square
from finetune.data.photos import mask_beside, open_image
from finetune.data.saliency import QUICK, salient_box, shrunk

if TYPE_CHECKING:
    from data_tools.vision import Detector

MASK = "its mask"


def framing(file: Path, upright: Image.Image, detector: Detector | None) -> tuple[list[str], list[str]]:
    """Problems and notes about what is cut off in a photo. `upright` is the photo, RGB.

    Only what a detector finds is called cut at an edge without a doubt: half a person can be a good photo of one, so
    that a mask gives a note. Colours say nothing of edges: of the photos of eleven subjects they called three cut, for
    an arm that held the clock (two) and a cup beside the teapot.

    Raises:
        BadImage: the photo's mask can't be read.
    """
    problems = [
        f"the {thing.name} is cut at the {' and '.join(cut)} edge ({thing.score:.0%} certain)"
        for thing in (detector.find(upright) if detector is not None else [])
        if (cut := Subject(thing.box, "").cut)
    ]
    subject = _quick_subject(file, upright)
    if subject is None:
        return problems, []
    notes = []
    if subject.cut and subject.by == MASK:
        notes.append(f"the subject, by {subject.by}, ends at the {' and '.join(subject.cut)} edge")
    kept = share_in_square(subject.box, upright.size)
    if kept < 1:
        notes.append(f"a square crop at the middle keeps {kept:.0%} of the subject, by {subject.by}: see data crop")
    return problems, notes


def _quick_subject(file: Path, upright: Image.Image) -> Subject | None:
    beside = mask_beside(file)
    if beside is not None:
        box = box_of(np.asarray(open_image(beside, "black").convert("L")) > WHITE)
        return None if box is None else Subject(box, MASK)
    if upright.width == upright.height:
        return None  # the square crop keeps all of it
    box = salient_box(shrunk(upright, QUICK))
    return None if box is None else Subject(box, "its colours")
