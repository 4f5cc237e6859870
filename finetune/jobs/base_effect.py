"""Finds settings that have no effect with the recipe's base. `finetune.config.effect` checks the recipe itself."""

from __future__ import annotations

from pathlib import Path

from finetune.config.effect import at_default
from finetune.config.recipe import Recipe
from finetune.families.base import Family
from finetune.objectives.densities import Auto
from finetune.objectives.registry import objective_for

# setting -> the extra inputs that the base must read for the setting to have an effect
OF_INPUTS = {
    "data.mask_count": "inpaint",
    "data.edit_dropout": "edit",
    "sample.image_guidance": "edit",
}


def without_effect_on(family: Family, recipe: Recipe) -> list[str]:
    """Returns one sentence for each setting that has no effect with this base. Defaults are skipped."""
    found = []
    if recipe.base.inputs is not None and not family.widened:
        found.append(
            f"base.inputs is {recipe.base.inputs} but the base reads {family.inputs} inputs without it, so it has no "
            "effect: leave it out"
        )
    found += _of_source(recipe)
    for key, inputs in OF_INPUTS.items():
        if family.inputs != inputs and not at_default(recipe, key):
            section, name = key.split(".")
            found.append(
                f"{key} is {getattr(getattr(recipe, section), name)} but the base reads no {inputs} inputs, so it has "
                f"no effect: leave it out, or use a base that reads them (or base.inputs={inputs})"
            )
    found += _of_density(family, recipe)
    found += _of_negatives(family, recipe)
    return found


def _of_source(recipe: Recipe) -> list[str]:
    """Settings of `base:` for another kind of base than the one that is named."""
    base = recipe.base
    is_folder = base.source == "tiny" or Path(base.source).is_dir()
    found = []
    if base.like is not None and (is_folder or not Path(base.source).is_file()):
        found.append(
            f"base.like is {base.like!r} but {base.source!r} is no single file, so it has no effect: leave it out"
        )
    if base.revision is not None and (is_folder or Path(base.source).is_file()):
        found.append(
            f"base.revision is {base.revision!r} but the base {base.source!r} is on this disk, so it has no effect: "
            "leave it out"
        )
    return found


def _of_density(family: Family, recipe: Recipe) -> list[str]:
    """Settings of `density: auto` that belong to another density than the base's own."""
    density = recipe.objective.density
    own = objective_for(family.schedule.prediction).default_density
    if not isinstance(density, Auto):
        return []
    return [
        f"objective.density.{name} is {value} but objective.density is auto, which is "
        f"{own.model_fields['kind'].default} for this base, so it has no effect: leave it out, or set "
        "objective.density.kind=logit_normal"
        for name, value in density.given.items()
        if name not in own.model_fields
    ]


def _of_negatives(family: Family, recipe: Recipe) -> list[str]:
    """Negative prompts for a base that reads none (Flux)."""
    if "negative_prompt" in family.drawing.arguments(1.0, [""]):
        return []
    given = {"sample.negative": recipe.sample.negative}
    if recipe.prior.class_images is not None:
        given["prior.negative"] = recipe.prior.class_images.negative
    return [
        f"{key} is {value!r} but {family.name} reads no negative prompt, so it has no effect: leave it out"
        for key, value in given.items()
        if value
    ]
