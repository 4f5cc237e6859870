"""In which precision a run loads its base, computes, and trains."""

from __future__ import annotations

import torch

from finetune.config.recipe import Recipe
from finetune.core.devices import DTYPES
from finetune.families.base import Family
from finetune.training.accelerate import resolve_precision


def base_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype in which a recipe's run loads its base."""
    compute = DTYPES[resolve_precision(recipe.run)]
    return torch.bfloat16 if recipe.run.weights == "bf16" else recipe.method.weight_dtype(compute)


def set_precision(family: Family, recipe: Recipe) -> None:
    """Tells a family how its weights are trained, and how they compute. Call it before `Method.attach`."""
    held = recipe.run.weights == "bf16"
    family.trained_dtype = torch.bfloat16 if held else torch.float32
    family.autocast = None if held else recipe.method.autocast_dtype(DTYPES[resolve_precision(recipe.run)])


def computes_in(family: Family) -> str:
    """The precision in which a family predicts: "fp32", "bf16" or "fp16"."""
    dtype = family.autocast or family.parts.dtype("denoiser")
    return next(name for name, own in DTYPES.items() if own == dtype)
