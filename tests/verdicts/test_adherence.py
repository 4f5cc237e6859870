"""What images show of their prompts: the wording of questions, the arithmetic, and a base that can tell."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from finetune.families.source import load_family
from finetune.jobs.ask_images import canvas_of, image_latents
from finetune.objectives.densities import Uniform
from finetune.objectives.registry import build_objective
from finetune.objectives.schedule import Schedule
from finetune.objectives.settings import ObjectiveSettings
from finetune.sampling.draw import draw
from finetune.sampling.settings import Sampling
from finetune.verdicts.adherence import (
    IMAGES,
    LEVELS,
    PromptShown,
    Question,
    beside,
    helped,
    images_of,
    predictions,
    questions,
    with_class,
)
from finetune.verdicts.bank import Canvas
from finetune.verdicts.points import Point, Predictor


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a photo of zwx mug on the beach", "a photo of a mug on the beach"),
        ("a photo of the zwx mug", "a photo of the mug"),
        ("My zwx mug, at night", "My mug, at night"),
        ("a photo of zwx", "a photo of a mug"),
        ("zwxy mug and zwx mugs", "zwxy mug and a mug mugs"),
        ("a photo of a mug", "a photo of a mug"),
        ("ZWX Mug in the snow", "a mug in the snow"),  # CLIP's tokenizers make zwx of ZWX
        ("the mug zwx and a smug zwx", "the mug and a smug a mug"),
    ],
)
def test_a_question_has_the_class_in_place_of_the_subject(prompt: str, said: str) -> None:
    assert with_class(prompt, "zwx", "mug") == said


def test_a_new_word_is_replaced_too() -> None:
    assert with_class("a photo of <zwx> at night", "<zwx>", "mug") == "a photo of a mug at night"


def test_only_prompts_that_say_more_than_the_class_are_asked_about() -> None:
    default = ["a photo of zwx mug", "a photo of zwx mug on the beach", "a photo of zwx mug in the snow", "a mug"]
    plain = "a photo of a mug"
    assert questions(default, "zwx", "mug") == [
        Question(default[1], "a photo of a mug on the beach", plain),
        Question(default[2], "a photo of a mug in the snow", plain),
    ]
    assert questions(default[1:2], "zwx", "mug") == []  # no other images to compare with
    assert questions(["a mug"], "zwx", "mug") == []
    assert questions([default[0], "A photo of ZWX mug."], "zwx", "mug") == []


def test_prompts_of_two_subjects_that_say_the_same_of_them() -> None:
    subjects = {"zwx": "toy mug", "sks": None}
    same = ("a photo of zwx toy mug on the beach", "a photo of SKS on the beach")
    assert {beside(prompt, subjects) for prompt in same} == {"a photo of a thing on the beach"}
    assert beside("a mug on the beach", subjects) == "a mug on the beach"


def test_how_many_images_are_asked_about() -> None:
    assert [images_of(count, 4) for count in (1, 2, 4, 5, 8, 9)] == [4, 4, 4, 3, 0, 0]
    assert [images_of(2, drawn) for drawn in (0, 1, 2, 9)] == [0, 0, 0, IMAGES]
    assert predictions(2, 4) == 3 * 8 * 2 * len(LEVELS)
    assert predictions(0, 4) == 0


def test_the_share_that_is_lost() -> None:
    own, others = [1.0, 1.1, 0.9, 1.0], [0.0, 0.1, -0.1, 0.0]
    assert PromptShown(own, others, own).lost == pytest.approx(0)
    assert PromptShown(own, others, others).lost == pytest.approx(1)
    assert PromptShown(own, others, [1.0, 1.0, 0.0, 0.0]).lost == pytest.approx(0.5)
    assert PromptShown(own, others).lost is None
    assert PromptShown([0.3, -0.3, 0.2], others, own).lost is None  # no more than chance
    assert PromptShown([1.0], [0.0], [1.0]).lost is None


def test_how_much_words_help_is_the_difference_of_the_errors() -> None:
    """A model that is right with the prompt and off by .5 without it gains .25, whatever the image and noise."""
    objective = build_objective(ObjectiveSettings(density=Uniform()), Schedule.from_config({}), 1.0)
    canvas = Canvas((4, 8, 8), 64, objective)

    def predict(points: Sequence[Point]) -> list[Tensor]:
        off = {"a photo of a mug": 0.5, "a photo of a mug at night": 0.0, "a photo of a mug at home": 1.0}
        return [point.target + off[point.prompt] for point in points if point.target is not None]

    night, home = (Question("", f"a photo of a mug at {place}", "a photo of a mug") for place in ("night", "home"))
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    values = helped(predict, canvas, [(latents, night), (2 * latents, night), (latents, home)])
    assert values == pytest.approx([0.25, 0.25, -0.75], abs=1e-5)


def test_the_tiny_base_tells_where_its_images_are() -> None:
    family = load_family("tiny")
    places = ("on the beach", "in the snow")
    asked = [Question("", f"a photo of a mug {place}", "a photo of a mug") for place in places]
    texts = [question.said for question in asked for _ in range(4)]
    images = draw(family, texts, Sampling(steps=8, batch_size=8), seeds=range(8))
    latents = [image_latents(family, image.convert("RGB")) for image in images]
    predict, canvas = Predictor(family, family.encode_prompts, 16), canvas_of(family, images[0].width)
    beach, snow = latents[:4], latents[4:]
    own, others = (helped(predict, canvas, [(each, asked[0]) for each in group]) for group in (beach, snow))
    assert PromptShown(own, others, own).sure
    lost = PromptShown(own, others, [own[0], *others[1:]]).lost
    assert lost is not None
    assert 0.5 < lost < 1
