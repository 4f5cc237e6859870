"""Where the subject of a photo is: from its mask file, a detector, its alpha channel, or its colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data_tools.photo_set import Entry, is_mask
from data_tools.quality import find_bars
from data_tools.segment import segment
from finetune.data.blobs import Box, box_of
from finetune.data.decoding import alpha_channel, open_image

if TYPE_CHECKING:
    from data_tools.vision import Detector

WHITE = 127  # of 255: from here on a mask says subject
EDGES = ("left", "top", "right", "bottom")
AT_EDGE = 0.004  # of a side: a subject as near to it is probably cut


@dataclass(frozen=True)
class Subject:
    """Where a subject is: the `box` as shares of the photo's sides, and `by` what it was found.

    `why_not` says why the box can't be relied on, or is empty.
    """

    box: Box
    by: str
    why_not: str = ""

    @property
    def cut(self) -> list[str]:
        """The sides of the photo that the subject touches."""
        left, top, right, bottom = self.box
        apart = (left, top, 1 - right, 1 - bottom)
        return [edge for edge, distance in zip(EDGES, apart, strict=True) if distance <= AT_EDGE]

    @property
    def area(self) -> float:
        """The box's share of the photo."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


NOTHING = Subject((0.0, 0.0, 1.0, 1.0), "nothing", "no subject was found")


def find_subject(entry: Entry, image: Image.Image, detector: Detector | None) -> Subject:
    """Finds the subject of a photo. `image` is the upright photo, RGB.

    The first of these that there is decides: a mask file, an alpha channel, the detector, the photo's colours.

    Raises:
        BadImage: the mask can't be read.
    """
    marked = marked_subject(entry)
    if marked is not None:
        return marked
    if detector is not None:
        found = detector.find(image)
        if not found:
            return Subject(NOTHING.box, "the detector", "the detector finds nothing")
        return Subject(found[0].box, f"the detector ({found[0].name}, {found[0].score:.0%} certain)")
    return by_colours(image)


def marked_subject(entry: Entry) -> Subject | None:
    """What the mask file or the alpha channel of a photo says, or None if it has neither.

    Raises:
        BadImage: the mask can't be read.
    """
    for file in entry.companions:
        if is_mask(file):
            return _of_grey(open_image(file, "black").convert("L"), "its mask")
    channel = alpha_channel(entry.path)
    if channel is None or channel.getextrema() == (255, 255):
        return None
    return _of_grey(channel, "its alpha channel")


def _of_grey(image: Image.Image, by: str) -> Subject:
    box = box_of(np.asarray(image) > WHITE)
    return Subject(box, by) if box is not None else Subject(NOTHING.box, by, f"{by} is black")


def by_colours(image: Image.Image) -> Subject:
    """The subject by colours alone, inside of bars at the edges."""
    inner = without_bars(image)
    found = segment(image.crop(inner))
    box = box_of(found.mask > 0.5)
    if box is None or not found.clear:
        return Subject(NOTHING.box, "its colours", "its colours do not tell subject from background")
    return Subject(_outer(box, inner, image.size), "its colours")


def without_bars(image: Image.Image) -> tuple[int, int, int, int]:
    """The part of a photo between bars of one colour at its edges: left, top, right and bottom in pixels."""
    left, top, right, bottom = find_bars(np.asarray(image))
    width, height = image.size
    rest = 2  # pixels: compression softens a bar's edge
    across = (int(left * width) + rest, width - int(right * width) - rest) if left else (0, width)
    down = (int(top * height) + rest, height - int(bottom * height) - rest) if top else (0, height)
    return across[0], down[0], across[1], down[1]


def _outer(box: Box, inner: tuple[int, int, int, int], size: tuple[int, int]) -> Box:
    """A box inside of `inner` as shares of the whole photo."""
    width, height = inner[2] - inner[0], inner[3] - inner[1]
    left, top, right, bottom = (
        (start + share * length) / side
        for share, start, length, side in zip(
            box, (*inner[:2], *inner[:2]), (width, height) * 2, (*size, *size), strict=True
        )
    )
    return left, top, right, bottom
