"""How much the images changed: those before and after training have the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32  # pixels: what an image shows, and not its grain
# Of 126 runs on the tiny base that learned most of their subject none is below .48. Two that learned next to nothing,
# and whose loss said otherwise, are at .24 and .25.
LITTLE = 0.35

Pixels = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """`share`: the mean difference between images before and after training, in units of the mean difference between
    two images before it. `thing`: what is learned, a "subject" or a "style"."""

    share: float
    thing: str

    @property
    def sentence(self) -> str:
        """What to look at; empty where the images changed as they should."""
        if self.share >= LITTLE:
            return ""
        return (
            f"The images with the token changed little: by {self.share:.0%} of what two images of the base differ. "
            f"Look whether they show the {self.thing}."
        )


def change(pairs: Sequence[tuple[Image.Image, Image.Image]], thing: str) -> Change | None:
    """Of pairs (before, after) of prompts with the token; None for fewer than two, or where the base draws one image
    alone."""
    before, after = ([_values(pair[side]) for pair in pairs] for side in (0, 1))
    apart = [_distance(one, other) for one, other in combinations(before, 2)]
    if not apart or not any(apart):
        return None
    moved = [_distance(one, other) for one, other in zip(before, after, strict=True)]
    return Change(round(float(np.mean(moved) / np.mean(apart)), 4), thing)


def said_of_pictures(held: Mapping[str, Any]) -> list[str]:
    """The sentences about the drawn images in a run's verdict.json."""
    parts = (held.get("prompts"), held.get("changed"), held.get("memorisation"))
    said = [part.get("sentence") for part in parts if isinstance(part, dict)]
    return [text for text in said if isinstance(text, str) and text]


def _values(image: Image.Image) -> Pixels:
    """[SIDE, SIDE, 3]"""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)


def _distance(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one - other).mean())
