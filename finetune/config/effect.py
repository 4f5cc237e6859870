"""Settings that another setting makes useless. Who gives one expects something of it, so it is refused by name.

Only what the recipe alone tells: what depends on the base (an inpainting base needs no `base.inputs`) passes here and
is found by `finetune.jobs.base_effect`. What belongs to a kind, such as min-SNR's gamma, is a setting of that kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.config.recipe import Recipe


@dataclass(frozen=True)
class Needs:
    """`key` does something only where `other` is one of `values`, of which the first is the one to advise."""

    key: str
    other: str
    values: tuple[Any, ...]


NEEDS = (
    Needs("data.bucket_tolerance", "data.shape", ("buckets",)),
    Needs("data.crops", "data.crop", ("random",)),
    Needs("data.mask_floor", "data.masks", ("auto", "alpha", "files")),
    Needs("data.mask_count", "base.inputs", ("inpaint", None)),
    Needs("data.edit_dropout", "base.inputs", ("edit", None)),
    Needs("sample.image_guidance", "base.inputs", ("edit", None)),
)


def without_effect(recipe: Recipe) -> list[str]:
    """The settings that do nothing in this recipe, each in a sentence.

    One at its default asks for nothing: a run's own recipe.yaml, which holds every key, can be trained again.
    """
    found = []
    for needs in NEEDS:
        value, other = (getattr(*_place(recipe, key)) for key in (needs.key, needs.other))
        if not at_default(recipe, needs.key) and other not in needs.values:
            found.append(
                f"{needs.key} is {value} but {needs.other} is {other}, so it has no effect: leave it out, or set "
                f"{needs.other}={needs.values[0]}"
            )
    max_error, warmup, steps = recipe.export.max_error, recipe.optim.warmup, recipe.run.steps
    if not at_default(recipe, "export.max_error") and recipe.leaves_as_trained:
        found.append(
            f"export.max_error is {max_error} but a {recipe.method.kind} leaves as it was trained, without an error: "
            "leave it out"
        )
    span, shaped = recipe.optim.schedule_steps, recipe.optim.schedule != "constant" or recipe.method.has_windows
    if span is not None and not shaped:
        found.append(
            f"optim.schedule_steps is {span} but optim.schedule is constant, so it has no effect: leave it out, or "
            "set optim.schedule=cosine"
        )
    if warmup > steps:
        found.append(
            f"optim.warmup is {warmup} but run.steps is {steps}, so the learning rate never reaches optim.lr: set "
            f"optim.warmup to at most {steps}, or 0"
        )
    return found


def at_default(recipe: Recipe, key: str) -> bool:
    """Whether `section.key` asks for nothing."""
    section, name = _place(recipe, key)
    return bool(getattr(section, name) == type(section).model_fields[name].get_default())


def _place(recipe: Recipe, key: str) -> tuple[Any, str]:
    section, name = key.split(".")
    return getattr(recipe, section), name
