"""The seam of the evaluation: what a metric is given, and what it returns.

A new metric is one new file in `finetune.evaluation.metrics` with a subclass of `Metric`. A package outside finetune
adds its own with an entry point of the group `finetune.evaluation.metrics`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from finetune.evaluation.statistics import Vectors, among, cosines, interval

Group = Literal["subject", "class"]
Kind = Literal["object", "live", "style"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True)
class Prompt:
    """A prompt that images were drawn from.

    `plain` is the same prompt without the token or the style's words: what a text encoder that was never trained on
    them understands. `group`: whether the images should show the subject (or the style), or its class.
    """

    text: str
    plain: str
    group: Group = "subject"


@dataclass(frozen=True)
class Pictures:
    """The image files of one source, for each prompt. `about`: what the JSON and the page say of the source."""

    name: str
    prompts: Sequence[Prompt]
    files: Sequence[Sequence[Path]]
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Seen:
    """What one backbone sees of one source's images: one row of numbers for each image.

    Attributes:
        images: for each prompt [its images, width].
        photos: [photos, width].
        texts: [prompts, width] of the plain prompts; None for backbones that read no text.
    """

    prompts: Sequence[Prompt]
    images: Sequence[Vectors]
    photos: Vectors
    texts: Vectors | None = None

    def of(self, group: Group) -> list[int]:
        """The numbers of the prompts of a group that have images."""
        return [k for k, prompt in enumerate(self.prompts) if prompt.group == group and len(self.images[k])]


@dataclass(frozen=True)
class Score:
    """A metric's value for one source; None where it can't be told, and then `note` says why.

    `low` and `high` are the 95 % bootstrap interval over prompts, None where there is none. `prompts`: number of a
    prompt -> its own value. `extra`: further numbers by their names.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    prompts: Mapping[int, float] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


class Metric(ABC):
    """A number for the images of one source.

    Class attributes:
        name: what `--metrics` calls it.
        place: where it stands in tables, the smallest first.
        title: what the page calls it.
        backbone: the kind of network that looks at the images (`finetune.evaluation.backbones`).
        higher_is_better: the direction.
        meaning: what the number says.
        blind: what it can't tell.
        source: the paper that defines it.
        group: the images that it looks at.
        for_kinds: what it is meaningful for.
        default: whether it is measured when nobody chose metrics and its backbone was not named.
        least: images that are needed for each prompt.
    """

    name: ClassVar[str]
    place: ClassVar[int] = 100
    title: ClassVar[str]
    backbone: ClassVar[str]
    higher_is_better: ClassVar[bool]
    meaning: ClassVar[str]
    blind: ClassVar[str]
    source: ClassVar[str]
    group: ClassVar[Group] = "subject"
    for_kinds: ClassVar[tuple[Kind, ...]] = KINDS
    default: ClassVar[bool] = False
    least: ClassVar[int] = 1

    @abstractmethod
    def score(self, seen: Seen) -> Score:
        """The value for one source."""

    def reference(self, photos: Vectors) -> float | None:
        """The same number for the photos themselves, [photos, width]; None where there is none."""
        return None


class PromptMetric(Metric):
    """A metric with a value for each prompt; the mean over prompts is its value."""

    def score(self, seen: Seen) -> Score:
        chosen = [k for k in seen.of(self.group) if len(seen.images[k]) >= self.least]
        if not chosen:
            return Score(None, note=self._missing())
        values = {k: self.of_prompt(seen.images[k], seen, k) for k in chosen}
        low, high = interval(list(values.values())) or (None, None)
        return Score(float(np.mean(list(values.values()))), low, high, values)

    def _missing(self) -> str:
        if self.group == "class":
            return "there are no images of the class alone"
        return f"no prompt has {self.least} images" if self.least > 1 else "there are no images of the subject"

    @abstractmethod
    def of_prompt(self, images: Vectors, seen: Seen, number: int) -> float:
        """The value of prompt `number`, whose images are `images` [n, width]."""


class Likeness(PromptMetric):
    """The mean cosine over all pairs of an image and a photo. Subclasses name the network: another `backbone`."""

    higher_is_better = True

    def of_prompt(self, images: Vectors, seen: Seen, number: int) -> float:
        return float(np.mean(cosines(images, seen.photos)))

    def reference(self, photos: Vectors) -> float | None:
        return among(cosines(photos, photos))


class Diversity(PromptMetric):
    """How different the images of one prompt are. Subclasses say what the difference of a pair is."""

    higher_is_better = True
    least = 2

    @abstractmethod
    def between(self, images: Vectors) -> float | None:
        """The mean difference over all pairs of `images` [n, width]; None for fewer than two."""

    def of_prompt(self, images: Vectors, seen: Seen, number: int) -> float:
        value = self.between(images)
        assert value is not None  # because of `least`
        return value

    def reference(self, photos: Vectors) -> float | None:
        return self.between(photos)


class SetMetric(Metric):
    """A distance of all images, as one set, to all photos."""

    higher_is_better = False

    def score(self, seen: Seen) -> Score:
        parts = [seen.images[k] for k in seen.of(self.group)]
        if sum(map(len, parts)) < 2 or len(seen.photos) < 2:
            return Score(None, note="it needs two images and two photos at least")
        return self.of_sets(parts, seen.photos)

    @abstractmethod
    def of_sets(self, parts: Sequence[Vectors], photos: Vectors) -> Score:
        """The value for the images of each prompt, [its images, width], and the photos [photos, width]."""
