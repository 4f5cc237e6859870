"""Measures a model in its own space, at points that are fixed when the run begins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from finetune.core.rng import generator
from finetune.verdicts.bank import LEVELS, Bank
from finetune.verdicts.base import (
    CLASS,
    DRAWN,
    DRAWN_PLAIN,
    ELSEWHERE,
    ELSEWHERE_PLAIN,
    EMPTY,
    HELD_OUT,
    PHOTOS,
    PHOTOS_PLAIN,
    SUBJECT,
    Look,
    Measure,
    Sets,
)
from finetune.verdicts.due import CLASS_DRAWINGS, DRAWINGS, OTHERS
from finetune.verdicts.points import Point, Predict, asked
from finetune.verdicts.registry import MEASURES

SEEN = 0.4  # the share of the noise levels at which the base's images are shown
SMALL = {"an", "and", "at", "by", "for", "in", "of", "on", "the", "to", "with", "photo"}  # which name nothing


@dataclass(frozen=True)
class Material:
    """What a run is measured with.

    `photos` and `held_out`: points of crops that are trained on, and of crops that are not. `classes`: pairs (prompt
    of the class without the token, or None if there is no class; the same with it). `others`: everyday prompts about
    other things; `known`: prompts about other things that the base surely knows.
    """

    photos: Sequence[Point]
    held_out: Sequence[Point]
    classes: Sequence[tuple[str | None, str]]
    others: Sequence[str]
    known: Sequence[str] = ()

    @property
    def prompts(self) -> list[str]:
        """Every prompt that is asked."""
        crops = [point.prompt for point in (*self.photos, *self.held_out)]
        pairs = [prompt for pair in self.classes for prompt in pair if prompt is not None]
        return list(dict.fromkeys(["", *crops, *pairs, *self.others, *self.known]))


class BaseProbe:
    """Compares a model with what it was when this was made: before training, which is the base.

    Args:
        predict: predicts with the current weights.
        sets: the points by the names of their sets.
    """

    def __init__(self, predict: Predict, sets: Sets) -> None:
        self.predict, self.sets = predict, sets
        self.measures: list[Measure] = [
            kind()
            for kind in MEASURES.values()
            if issubclass(kind, Measure) and all(sets.get(name) for name in (*kind.reads, *kind.of_base))
        ]
        self.read = list(dict.fromkeys(name for measure in self.measures for name in measure.reads))
        once = [name for measure in self.measures for name in measure.of_base]
        self.base = {name: predict(sets[name]) for name in dict.fromkeys([*self.read, *once])}

    @property
    def left_out(self) -> list[str]:
        """The names of the measures at points that this run can't have."""
        there = {measure.name for measure in self.measures}
        return [name for name, kind in MEASURES.items() if issubclass(kind, Measure) and name not in there]

    def values(self) -> dict[str, float]:
        """The measures of the current weights, by name."""
        return self._values({name: self.predict(self.sets[name]) for name in self.read})

    @property
    def of_base(self) -> dict[str, float]:
        """The measures of the base itself, which is not asked again."""
        return self._values(self.base)

    def _values(self, now: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
        look = Look(self.sets, now, self.base)
        return {measure.name: measure.value(look) for measure in self.measures}


def make_sets(material: Material, bank: Bank) -> dict[str, Sequence[Point]]:
    """The points of every set; empty where the material has nothing for it. To be called before training."""
    others = [point for way in bank.drawings(list(material.others)) for point in way]
    pairs = [material.classes[number % len(material.classes)] for number in range(CLASS_DRAWINGS)]
    ways = bank.drawings([plain if plain is not None else named for plain, named in pairs])
    points = [point for way in ways for point in way]
    drawn = _drawn(bank, material.known)
    classes, named = ([pair[side] for pair in pairs for _ in range(LEVELS)] for side in (0, 1))
    return {
        PHOTOS: material.photos,
        PHOTOS_PLAIN: asked(material.photos, [""]),
        HELD_OUT: material.held_out,
        CLASS: [] if None in classes else asked(points, [text or "" for text in classes]),
        SUBJECT: asked(points, [text or "" for text in named]),
        EMPTY: asked(points, [""]),
        ELSEWHERE: others,
        ELSEWHERE_PLAIN: asked(others, [""]),
        DRAWN: drawn,
        DRAWN_PLAIN: asked(drawn, [""]),
    }


def _drawn(bank: Bank, prompts: Sequence[str]) -> list[Point]:
    """A point of each prompt's image, with little enough noise to show what the image is."""
    canvas, points = bank.canvas, []
    for number, (prompt, x0) in enumerate(zip(prompts, bank.images(prompts), strict=True)):
        t = canvas.objective.timesteps(torch.tensor([SEEN * canvas.share]))
        noise = torch.randn(x0.shape, generator=generator(0, "verdict image", number))
        noisy = canvas.objective.add_noise(x0[None], noise[None], t)[0]
        target = canvas.objective.target(x0[None], noise[None], t)[0]
        points.append(Point(noisy, t[0], prompt, canvas.geometry, target=target))
    return points


@lru_cache(maxsize=1)
def _neutral() -> tuple[str, ...]:
    text = Path(__file__).with_name("neutral.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def neutral_prompts(nouns: Sequence[str | None], count: int = OTHERS) -> list[str]:
    """The first `count` prompts of the shipped list that name none of a run's nouns."""
    return _without(nouns, _neutral())[:count]


def known_prompts(nouns: Sequence[str | None], listed: Sequence[str]) -> list[str]:
    """Prompts that name none of a run's nouns, from a base's own list, or else of the shipped one."""
    return (_without(nouns, listed) or neutral_prompts(nouns))[:DRAWINGS]


def _without(nouns: Sequence[str | None], prompts: Sequence[str]) -> list[str]:
    words = {word for noun in nouns if noun for word in _words(noun)}
    return [prompt for prompt in prompts if not words & _words(prompt)]


def _words(text: str) -> set[str]:
    """The words that name something, in the singular: that of "man's" is "man", that of "dogs" "dog"."""
    found = re.findall(r"[^\W\d_]+", text.lower())
    return {word.removesuffix("s") for word in found if len(word) > 1} - SMALL
