"""The interface of measures: numbers about the model's predictions at fixed points, from which verdicts are made.

Distances are in units of the base's own effect of prompts: 1 is as far as a prompt moves the base's prediction from
that for the empty prompt. So a number means the same on every base. To add a measure, add one file to `measures/`.

Drift is measured of what prompts do, which is the difference between the predictions with and without them: guidance
multiplies it (arXiv:2207.12598). What a training adds to every prediction alike, such as the grain of the photos, is
in both and cancels: after a short run on the tiny base it is three times as large as all else, and images are none
the worse for it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from finetune.verdicts.points import Point, squared_distance

# The sets of points. "class", "subject" and "empty" are the same points with the prompt of the class, the same with
# the token, and without a prompt. The two of "elsewhere", of "photos" and of "drawn" are the same points with and
# without one; "drawn" are images by the base itself.
PHOTOS, PHOTOS_PLAIN, HELD_OUT = "photos", "photos without a prompt", "held_out"
CLASS, SUBJECT, EMPTY = "class", "subject", "empty"
ELSEWHERE, ELSEWHERE_PLAIN = "elsewhere", "elsewhere without a prompt"
DRAWN, DRAWN_PLAIN = "drawn", "drawn without a prompt"

# A base on which prompts have next to no effect has no unit; below this share of the prediction's own size, the share
# is the unit. The tiny base's smallest effect at points of high noise is 50 times as large.
LEAST_EFFECT = 1e-3

Sets = Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class Look:
    """The predictions at each set of points, by the model `now` and by the `base`."""

    sets: Sets
    now: Mapping[str, Sequence[Tensor]]
    base: Mapping[str, Sequence[Tensor]]

    def effect(self, name: str, plain: str) -> float:
        """The unit: the mean squared distance between the base's predictions at a set and at the same points without
        a prompt."""
        outputs = self.base[name]
        size = sum(float(output.square().mean()) for output in outputs) / len(outputs)
        return max(squared_distance(outputs, self.base[plain]), LEAST_EFFECT * size, 1e-12)

    def change(self, name: str, plain: str) -> Tensor:
        """[N, C, h, w]: how what the prompts of a set do has changed: (now - now plain) - (base - base plain)."""
        return _difference(self.now, name, plain) - _difference(self.base, name, plain)

    def drift(self, name: str, plain: str) -> float:
        """The length of `change`, in units of the prompts' effect."""
        return math.sqrt(float(self.change(name, plain).square().mean()) / self.effect(name, plain))


def _difference(outputs: Mapping[str, Sequence[Tensor]], name: str, plain: str) -> Tensor:
    return torch.stack(list(outputs[name])) - torch.stack(list(outputs[plain]))


def share_of_way(gone: Tensor, way: Tensor, least: float) -> float:
    """The share of `way` that `gone` covers: <gone, way> / |way|^2; all [N, ...].

    A way whose mean square is below `least` counts as one of that length: what went nowhere is no goal.
    """
    return float((gone * way).mean()) / max(float(way.square().mean()), least)


class Number:
    """A number about a run, for one step of it.

    Class attributes:
        name: its key in RUN/verdicts.jsonl.
        title: for the page.
        meaning: a sentence for the page.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    meaning: ClassVar[str]


class Measure(Number, ABC):
    """A number that compares predictions at points.

    Class attributes:
        reads: the sets of points that it compares; it is left out where one of them is empty.
        of_base: further sets, of which it reads the base's predictions alone.
    """

    reads: ClassVar[tuple[str, ...]]
    of_base: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def value(self, look: Look) -> float:
        """The number at this step."""
