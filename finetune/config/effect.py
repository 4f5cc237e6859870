"""Settings that another setting makes useless. Who gives one expects something of it, so it is refused by name.

Only what the recipe alone tells: what depends on the base (an inpainting base needs no `base.inputs`; a flow draws
logit_normal by itself) passes here.
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
    Needs("objective.gamma", "objective.weighting", ("min_snr", "p2")),
    Needs("objective.huber_c", "objective.loss", ("huber",)),
    Needs("objective.logit_mean", "objective.density", ("logit_normal", "auto")),
    Needs("objective.logit_std", "objective.density", ("logit_normal", "auto")),
    Needs("objective.mode_scale", "objective.density", ("mode",)),
)


def without_effect(recipe: Recipe) -> str | None:
    """The first setting that does nothing in this recipe, in a sentence; None where there is none.

    One at its default asks for nothing: a run's own recipe.yaml, which holds every key, can be trained again.
    """
    for needs in NEEDS:
        section, name = _place(recipe, needs.key)
        value, other = getattr(section, name), getattr(*_place(recipe, needs.other))
        if value != _default(section, name) and other not in needs.values:
            return (
                f"{needs.key} is {value} but {needs.other} is {other}, so it has no effect: leave it out, or set "
                f"{needs.other}={needs.values[0]}"
            )
    max_error = recipe.export.max_error
    if max_error != _default(recipe.export, "max_error") and recipe.leaves_as_trained:
        return (
            f"export.max_error is {max_error} but a {recipe.method.kind} leaves as it was trained, without an error: "
            "leave it out"
        )
    return None


def _place(recipe: Recipe, key: str) -> tuple[Any, str]:
    section, name = key.split(".")
    return getattr(recipe, section), name


def _default(section: Any, name: str) -> Any:
    return type(section).model_fields[name].get_default()
