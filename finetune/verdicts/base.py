"""The interface of measures: numbers about the model's predictions at fixed points, from which verdicts are made.

Distances are in units of the base's own effect of prompts: 1 is as far as a prompt moves the base's prediction from
that for the empty prompt. So a number means the same on every base. To add a measure, add one file to `measures/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from finetune.verdicts.points import Point, squared_distance

# the sets of points
PHOTOS, HELD_OUT, CLASS, SUBJECT, ELSEWHERE, EMPTY = "photos", "held_out", "class", "subject", "elsewhere", "empty"
PLAIN = " without a prompt"  # name of a set + PLAIN: the same points with the empty prompt, which only the base answers

# A base on which prompts have next to no effect has no unit; below this share of the prediction's own size, the share
# is the unit. Random weights, as in tests, are there; the smallest of trained bases seen is 40 times as large.
LEAST_EFFECT = 1e-4

Sets = Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class Look:
    """The predictions at each set of points, by the model `now` and by the `base`."""

    sets: Sets
    now: Mapping[str, Sequence[Tensor]]
    base: Mapping[str, Sequence[Tensor]]

    def effect(self, name: str) -> float:
        """The unit: the mean squared distance between the base's predictions with and without the prompts of a set."""
        outputs = self.base[name]
        size = sum(float(output.square().mean()) for output in outputs) / len(outputs)
        return max(squared_distance(outputs, self.base[name + PLAIN]), LEAST_EFFECT * size, 1e-12)

    def drift(self, name: str, unit: str) -> float:
        """How far the predictions at a set are from the base's, in units of its prompts' effect at the set `unit`."""
        return float((squared_distance(self.now[name], self.base[name]) / self.effect(unit)) ** 0.5)


class Measure(ABC):
    """A number about a run, for one step of it.

    Class attributes:
        name: its key in RUN/verdicts.jsonl.
        title: for the page.
        meaning: a sentence for the page.
        reads: the sets of points that it compares; it is left out where one of them is empty.
        units: the sets whose prompts' effect is its unit.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    meaning: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    units: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def value(self, look: Look) -> float:
        """The number at this step."""
