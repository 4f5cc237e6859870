"""Finds settings that have no effect because of another setting. They are refused: the user expects an effect.

This module checks only what the recipe itself shows. What depends on the base (an inpainting base needs no
`base.inputs`) is checked by `finetune.jobs.base_effect`. A setting of one kind, such as min-SNR's gamma, exists only
in the settings of that kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.optim.base import WHOLE

if TYPE_CHECKING:
    from finetune.config.recipe import Recipe


@dataclass(frozen=True)
class Needs:
    """`key` has an effect only if `other` is one of `values`. Messages suggest the first of them."""

    key: str
    other: str
    values: tuple[Any, ...]


NEEDS = (
    Needs("data.bucket_tolerance", "data.shape", ("buckets",)),
    Needs("data.crops", "data.crop", ("random",)),
    Needs("data.keep_tags", "data.shuffle_tags", (True,)),
    Needs("data.tag_orders", "data.shuffle_tags", (True,)),
    Needs("data.caption_mix", "data.captions", ("auto", "files")),
    Needs("data.mask_floor", "data.masks", ("auto", "alpha", "files")),
    Needs("data.mask_count", "base.inputs", ("inpaint", None)),
    Needs("data.edit_dropout", "base.inputs", ("edit", None)),
    Needs("sample.image_guidance", "base.inputs", ("edit", None)),
)


def without_effect(recipe: Recipe) -> list[str]:
    """Returns one sentence for each setting that has no effect in this recipe.

    A setting at its default is not reported, so that a run's own recipe.yaml, which holds every key, can be trained
    again.
    """
    found = []
    for needs in NEEDS:
        value, other = (getattr(*_place(recipe, key)) for key in (needs.key, needs.other))
        if not at_default(recipe, needs.key) and other not in needs.values:
            found.append(
                f"{needs.key} is {value} but {needs.other} is {other}, so it has no effect: leave it out, or set "
                f"{needs.other}={needs.values[0]}"
            )
    repeats = [subject.repeats for subject in recipe.data.all_subjects]
    if isinstance(repeats[0], int) and repeats[0] > 1 and len(set(map(str, repeats))) == 1:
        found.append(
            f"data.repeats is {repeats[0]} for every photo, which only makes epochs longer: leave it out (run.steps "
            "says how long a run is), or repeat one of several subjects or some photos (data.repeats={'close-*': 3})"
        )
    if recipe.prior.kind != "none" and recipe.method.artifacts == ("embedding",):
        found.append(
            f"prior.kind is {recipe.prior.kind} but a {recipe.method.kind} trains only a new word, which changes no "
            "prompt without it, so it has no effect: set prior.kind=none"
        )
    max_error = recipe.export.max_error
    if not at_default(recipe, "export.max_error") and recipe.leaves_as_trained:
        found.append(
            f"export.max_error is {max_error} but a {recipe.method.kind} is exported exactly as it was trained: "
            "leave it out"
        )
    span, shaped = recipe.optim.schedule_steps, recipe.optim.schedule != "constant" or recipe.method.has_windows
    if span is not None and not shaped:
        found.append(
            f"optim.schedule_steps is {span} but optim.schedule is constant, so it has no effect: leave it out, or "
            "set optim.schedule=cosine"
        )
    return found + _never_at_full_rate(recipe)


def _never_at_full_rate(recipe: Recipe) -> list[str]:
    """A warm-up that outlasts its run, schedule or share of the run; and a share of the run that has no step."""
    optim, steps = recipe.optim, recipe.run.steps
    warmup, most = optim.warmup, optim.steps_within(WHOLE, steps)
    if warmup > most:
        key, why = "run.steps", "so the learning rate never reaches optim.lr"
        if most < steps:
            key, why = "optim.schedule_steps", "so the schedule ends before the learning rate reaches optim.lr"
        return [f"optim.warmup is {warmup} but {key} is {most}, {why}: set optim.warmup to at most {most}, or 0"]
    found = []
    for what, window in recipe.method.named_windows.items():
        own = optim.steps_within(window, steps)
        if own == 0:
            found.append(f"{what} trains in none of the {steps} steps{_remedy(optim.schedule_steps, steps)}")
        elif warmup > own:
            found.append(
                f"optim.warmup is {warmup} but {what} trains in {own} of the {steps} steps, so its learning rate "
                f"never becomes the full one: set optim.warmup to at most {own}, or 0"
            )
    return found


def _remedy(span: int | None, steps: int) -> str:
    if span is not None and span > steps:
        return f", as optim.schedule_steps is {span}: give more run.steps, or fewer optim.schedule_steps"
    return ": give more run.steps, or another share"


def at_default(recipe: Recipe, key: str) -> bool:
    """Whether the setting `key` (`section.name`) has its default value."""
    section, name = _place(recipe, key)
    return bool(getattr(section, name) == type(section).model_fields[name].get_default())


def _place(recipe: Recipe, key: str) -> tuple[Any, str]:
    section, name = key.split(".")
    return getattr(recipe, section), name
