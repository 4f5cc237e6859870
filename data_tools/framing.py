"""What the photo's edges, or the square crop of training, cut off: the subject, a face."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data_tools.crop import choose
from data_tools.subject import WHITE, Subject
from finetune.data.blobs import Box, box_of, share_in, share_in_square
from finetune.data.decoding import open_image
from finetune.data.photos import mask_beside
from finetune.data.saliency import QUICK, salient_box, shrunk

if TYPE_CHECKING:
    from data_tools.faces import Faces
    from data_tools.vision import Detector

MASK = "its mask"


@dataclass(frozen=True)
class Sought:
    """What must not be cut: the things that a detector finds, or else faces. Both may be missing."""

    detector: Detector | None = None
    faces: Faces | None = None

    def things(self, image: Image.Image) -> list[tuple[str, str, Box]]:
        """(name, how certain, box) of each thing in an RGB image."""
        if self.detector is not None:
            told = self.detector.find(image)
            return [(f"the {thing.name}", f" ({thing.score:.0%} certain)", thing.box) for thing in told]
        return [("a face", "", box) for box in self.faces.find(image)] if self.faces is not None else []


def framing(file: Path, upright: Image.Image, sought: Sought) -> tuple[list[str], list[str]]:
    """Problems and notes about what is cut off in a photo. `upright` is the photo, RGB.

    Only what was looked for is called cut without a doubt: half a person can be a good photo of one, so that a mask
    gives a note. Colours say nothing of edges: of the photos of eleven subjects they called three cut, for an arm that
    held the clock (two) and a cup beside the teapot.

    Raises:
        BadImage: the photo's mask can't be read.
    """
    subject = _quick_subject(file, upright)
    problems = [
        text for name, certain, box in sought.things(upright) for text in _cuts(name, certain, box, upright, subject)
    ]
    if subject is None:
        return problems, []
    notes = []
    if subject.cut and subject.by == MASK:
        notes.append(f"the subject, by {subject.by}, ends at the {' and '.join(subject.cut)} edge")
    kept = share_in_square(subject.box, upright.size)
    if kept < 1:
        notes.append(f"a square crop at the middle keeps {kept:.0%} of the subject, by {subject.by}: see data crop")
    return problems, notes


def _cuts(name: str, certain: str, box: Box, upright: Image.Image, subject: Subject | None) -> list[str]:
    """What cuts a thing: the photo's edge, and a face also the square crop of training, or one around the subject."""
    found = []
    cut = Subject(box, "").cut
    if cut:
        found.append(f"{name} is cut at the {' and '.join(cut)} edge{certain}")
    if "face" not in name:
        return found
    left, top, right, bottom = (min(max(share, 0.0), 1.0) for share in box)
    inside, (width, height) = (left, top, right, bottom), upright.size
    kept = share_in_square(inside, upright.size)
    if kept < 1:
        found.append(f"the square crop of training keeps {kept:.0%} of {name}: see data crop, or data.shape=buckets")
    suggested = choose(upright.size, subject.box, [(1, 1)], None) if subject is not None else None
    if suggested is None:
        return found
    (start, above, end, below), _ = suggested
    kept = share_in(inside, (start / width, above / height, end / width, below / height))
    if kept < 1:
        found.append(f"a square crop around the subject, as data crop makes it, keeps {kept:.0%} of {name}")
    return found


def _quick_subject(file: Path, upright: Image.Image) -> Subject | None:
    beside = mask_beside(file)
    if beside is not None:
        box = box_of(np.asarray(open_image(beside, "black").convert("L")) > WHITE)
        return None if box is None else Subject(box, MASK)
    if upright.width == upright.height:
        return None  # the square crop keeps all of it
    box = salient_box(shrunk(upright, QUICK))
    return None if box is None else Subject(box, "its colours")
