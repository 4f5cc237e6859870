"""Measures a model in its own space, at points that are fixed when the run begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from finetune.verdicts.bank import LEVELS, Bank
from finetune.verdicts.base import CLASS, ELSEWHERE, EMPTY, HELD_OUT, PHOTOS, PLAIN, SUBJECT, Look, Measure, Sets
from finetune.verdicts.points import Point, Predict, asked
from finetune.verdicts.registry import MEASURES
from finetune.verdicts.schedule import CLASS_DRAWINGS, EMPTY_POINTS, OTHERS


@dataclass(frozen=True)
class Material:
    """What a run is measured with.

    `photos` and `held_out`: points of crops that are trained on, and of crops that are not. `classes`: pairs (prompt
    of the class without the token, the same with it; None if it can't be said). `others`: prompts about other things.
    """

    photos: Sequence[Point]
    held_out: Sequence[Point]
    classes: Sequence[tuple[str, str | None]]
    others: Sequence[str]

    @property
    def prompts(self) -> list[str]:
        """Every prompt that is asked."""
        crops = [point.prompt for point in (*self.photos, *self.held_out)]
        pairs = [prompt for pair in self.classes for prompt in pair if prompt is not None]
        return list(dict.fromkeys(["", *crops, *pairs, *self.others]))


class Probe:
    """Compares a model with what it was when this was made: before training, which is the base.

    Args:
        predict: predicts with the current weights.
        sets: the points by the names of their sets.
    """

    def __init__(self, predict: Predict, sets: Sets) -> None:
        self.predict, self.sets = predict, sets
        self.measures: list[Measure] = [
            kind() for kind in MEASURES.values() if all(sets.get(name) for name in (*kind.reads, *kind.units))
        ]
        read = [name for measure in self.measures for name in measure.reads]
        plain = {
            name + PLAIN: asked(sets[name], [""]) for measure in self.measures for name in measure.units
        }
        self.read = list(dict.fromkeys(read))
        self.base = {name: predict(points) for name, points in ({n: sets[n] for n in self.read} | plain).items()}

    @property
    def left_out(self) -> list[str]:
        """The names of the measures that this run can't have."""
        return [name for name in MEASURES if name not in {measure.name for measure in self.measures}]

    def values(self) -> dict[str, float]:
        """The measures of the current weights, by name."""
        now = {name: self.predict(self.sets[name]) for name in self.read}
        look = Look(self.sets, now, self.base)
        return {measure.name: measure.value(look) for measure in self.measures}


def make_sets(material: Material, bank: Bank) -> dict[str, Sequence[Point]]:
    """The points of every set; empty where the material has nothing for it. To be called before training."""
    drawn = bank.drawings(list(material.others))
    others = [points[(2 * number + 1) % LEVELS] for number, points in enumerate(drawn)]
    pairs = [material.classes[number % len(material.classes)] for number in range(CLASS_DRAWINGS * bool(material.classes))]
    ways = bank.drawings([prompt for prompt, _ in pairs])
    classes = [points[(2 * n + level) % LEVELS] for n, points in enumerate(ways) for level in (1, 3)]
    named = [name for _, name in pairs for _ in (1, 3)]
    subject = [] if None in named else asked(classes, [name or "" for name in named])
    return {
        PHOTOS: material.photos,
        HELD_OUT: material.held_out,
        CLASS: classes,
        SUBJECT: subject if classes else [],
        ELSEWHERE: others,
        EMPTY: asked(others[:EMPTY_POINTS], [""]) if others else [],
    }


@lru_cache(maxsize=1)
def _neutral() -> tuple[str, ...]:
    text = Path(__file__).with_name("neutral.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def neutral_prompts(nouns: Sequence[str | None], count: int = OTHERS) -> list[str]:
    """The first `count` prompts of the shipped list that name none of a run's nouns."""
    words = {word for noun in nouns if noun for word in noun.lower().split()}
    return [prompt for prompt in _neutral() if not words & set(prompt.lower().split())][:count]
