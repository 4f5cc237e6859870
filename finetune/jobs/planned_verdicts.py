"""What the plan says of verdicts: how often a run is measured, on what, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.config.recipe import Recipe
from finetune.runs.plan import PlannedVerdicts
from finetune.verdicts.adherence import LEAST, TOGETHER, predictions, questions
from finetune.verdicts.bank import LEVELS
from finetune.verdicts.due import (
    CLASS_DRAWINGS,
    DRAWINGS,
    DRAWN,
    DRAWN_ONCE,
    FIRST,
    OTHERS,
    PHOTO_POINTS,
    POINTS,
    TRAINED,
    WHOLE_ONCE,
    asks_drawings,
    asks_images,
    due_steps,
    samples_in_step,
)
from finetune.verdicts.probe import neutral_prompts


def planned_verdicts(
    recipe: Recipe, held_out: Sequence[str] = (), sample_prompts: int | None = None
) -> PlannedVerdicts:
    """The verdicts of a recipe's run.

    Args:
        held_out: the names of the photos that are not trained on, where they are known.
        sample_prompts: the number of those whose images are asked about, where it is known.
    """
    run, prior, subjects = recipe.run, recipe.prior, recipe.data.all_subjects
    samples = samples_in_step(run, prior)
    steps, drawings = due_steps(run, samples), asks_drawings(run, samples)
    others = neutral_prompts([subject.class_noun for subject in subjects])
    classes = bool(recipe.data.trigger) or any(subject.class_noun is not None for subject in subjects)
    each = (
        POINTS + DRAWN * drawings - (0 if classes else LEVELS * CLASS_DRAWINGS) - 2 * LEVELS * (OTHERS - len(others))
    )
    count = _asked_about(recipe) if sample_prompts is None else sample_prompts
    answers = predictions(count, recipe.sample.count) * asks_images(run, samples)
    asked = (FIRST - POINTS + each * (len(steps) + 1) + answers) if steps else 0
    passes = prior.passes + (prior.others.passes if prior.others is not None else 0)
    return PlannedVerdicts(
        steps=list(steps),
        off=run.verdicts == "off",
        sharded=run.shard,
        predictions=asked,
        answers=answers if steps else 0,
        drawn_once=DRAWN_ONCE + WHOLE_ONCE * drawings if steps else 0,
        share=asked / (TRAINED * run.batch_size * passes * run.steps),
        points=PHOTO_POINTS,
        others=len(others),
        drawings=DRAWINGS if drawings else 0,
        classes=classes,
        hold_out=recipe.data.hold_out * len(subjects),
        held_out=list(held_out),
        keep_best=run.keep_best,
        keep=run.keep,
    )


def _asked_about(recipe: Recipe) -> int:
    """The sample prompts whose images are asked about, as far as a recipe alone tells."""
    nouns = [] if recipe.data.trigger else [subject.class_noun for subject in recipe.data.all_subjects]
    filled = [(noun, [text.replace("{noun}", noun) for text in recipe.sample.prompts]) for noun in nouns if noun]
    count = sum(len(questions(prompts, "{token}", noun)) for noun, prompts in filled)
    return min(count, TOGETHER // LEAST)
