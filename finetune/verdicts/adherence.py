"""Whether images show what their prompts say beside the subject ("on the beach"). The base tells, as a classifier.

A prompt that an image shows helps to predict the image (arXiv:2303.16203). How much is compared with what the class
alone does, at the same noise, and scaled by the base's own images: 1 is an image of the same prompt, 0 one of another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, variance

import torch
from torch import Tensor

from finetune.core.rng import generator
from finetune.verdicts.bank import Canvas
from finetune.verdicts.points import Point, Predict

LEVELS = (0.6, 0.7, 0.8, 0.9)  # of the noise: layout and surroundings are decided there, and not the grain
IMAGES = 4  # of a prompt, at most
TOGETHER = 4 * IMAGES  # of all prompts
LEAST = 3  # of a prompt: with fewer, chance looks like an answer
SURE = 2.0  # standard errors by which the base's images of a prompt and of others must differ
CLASS = "a photo of a {noun}"


@dataclass(frozen=True)
class Question:
    """A sample prompt about a subject: `said` has the class in place of the subject, `plain` says the class alone."""

    prompt: str
    said: str
    plain: str


def questions(prompts: Sequence[str], token: str, noun: str) -> list[Question]:
    """Of the prompts with the token, those that say more than the class; none where no other prompt has the token, as
    its images are what a prompt's are compared with."""
    plain = CLASS.format(noun=noun)
    asked = [Question(prompt, with_class(prompt, token, noun), plain) for prompt in dict.fromkeys(prompts)]
    about = [question for question in asked if question.said != question.prompt]
    more = [question for question in about if question.said.casefold().strip(" .") != plain.casefold()]
    return more if len(about) > 1 else []


def images_of(count: int, drawn: int) -> int:
    """The images of each prompt that are asked about, of `count` prompts with `drawn` images each; 0: too few."""
    each = min(IMAGES, TOGETHER // max(1, count), drawn)
    return each if each >= LEAST else 0


def predictions(count: int, drawn: int) -> int:
    """What it costs to ask about `count` prompts with `drawn` images each: the base's, as many of other prompts, and
    those of the result."""
    return 3 * count * images_of(count, drawn) * 2 * len(LEVELS)


def with_class(prompt: str, token: str, noun: str) -> str:
    """A prompt with the class in place of the subject: "the mug" for "the zwx mug", "a mug" for "zwx mug", "zwx"."""
    return _with(prompt, token, noun, noun)


def beside(prompt: str, subjects: Mapping[str, str | None]) -> str:
    """A prompt with the same word for each of its subjects (token -> noun), so that prompts of two subjects that say
    the same of them are equal. One without a subject stays as it is."""
    for token, noun in subjects.items():
        prompt = _with(prompt, token, noun, "thing")
    return prompt


def _with(prompt: str, token: str, noun: str | None, thing: str) -> str:
    """In any case: CLIP's tokenizers make zwx of ZWX."""
    named = r"\s+".join(map(re.escape, (noun or "").split()))
    before, behind = (rf"(?:{named}\s+)?", rf"(?:\s+{named})?") if named else ("", "")
    own = rf"(?<!\w){before}{re.escape(token)}{behind}(?!\w)"
    article = rf"(?<!\w)(an?|the|my|his|her|our|their|one|this|that)\s+{own}"
    with_article = re.sub(article, lambda found: f"{found[1]} {thing}", prompt, flags=re.IGNORECASE)
    return re.sub(own, lambda _: f"a {thing}", with_article, flags=re.IGNORECASE)


@dataclass(frozen=True)
class PromptShown:
    """How much more a prompt's words help to predict the base's images of it (`own`), the base's images of other
    prompts (`others`), and the trained model's images of it (`after`; none before the training ended)."""

    own: Sequence[float]
    others: Sequence[float]
    after: Sequence[float] = ()

    @property
    def sure(self) -> bool:
        """Whether the base's images of the prompt differ from those of others by more than chance."""
        if min(len(self.own), len(self.others)) < LEAST:
            return False
        error = sum(variance(values) / len(values) for values in (self.own, self.others)) ** 0.5
        return bool(fmean(self.own) - fmean(self.others) > SURE * error)

    @property
    def lost(self) -> float | None:
        """The share of the prompt's words that the trained model's images do not show; None where nothing tells."""
        if not self.sure or not self.after:
            return None
        none = fmean(self.others)
        return 1 - (fmean(self.after) - none) / (fmean(self.own) - none)


def helped(predict: Predict, canvas: Canvas, asked: Sequence[tuple[Tensor, Question]]) -> list[float]:
    """How much more each question's words than the class alone help to predict an image: the difference of the mean
    squared errors, the mean over LEVELS. All images have the same noise.

    Args:
        predict: predicts with the classifier's weights.
        canvas: the images' shape, and the noise levels.
        asked: pairs of clean latents [C, h, w] on the CPU and a question.
    """
    points = [
        _point(canvas, latents, number, prompt)
        for latents, question in asked
        for prompt, number in product((question.plain, question.said), range(len(LEVELS)))
    ]
    errors = torch.tensor([_error(point, output) for point, output in zip(points, predict(points), strict=True)])
    plain, said = errors.view(len(asked), 2, len(LEVELS)).mean(-1).unbind(1)
    values: list[float] = (plain - said).tolist()
    return values


def _point(canvas: Canvas, latents: Tensor, number: int, prompt: str) -> Point:
    objective, x0 = canvas.objective, latents[None]
    t = objective.timesteps(torch.tensor([LEVELS[number] * canvas.share]))
    noise = torch.randn(x0.shape, generator=generator(0, "adherence", number))
    noisy, target = objective.add_noise(x0, noise, t)[0], objective.target(x0, noise, t)[0]
    return Point(noisy, t[0], prompt, canvas.geometry, target=target)


def _error(point: Point, output: Tensor) -> float:
    assert point.target is not None
    return float((output - point.target).square().mean())
