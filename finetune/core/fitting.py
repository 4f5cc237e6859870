"""Copies saved weights into a model's, and refuses those of another model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from finetune.core.errors import BadInput

ADVICE = "give the run its own recipe.yaml back, or train again"


def copy_fitting(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str = "the saved weights") -> None:
    """Copies each of `saved` into the tensor of the same name in `own`. `what` names them in messages.

    Raises:
        BadInput: a name is unknown, or a shape is another one. Nothing was copied then.
    """
    for name, value in saved.items():
        if name not in own:
            raise BadInput(f"{what} do not fit the recipe, which trains no {name!r}: {ADVICE}")
        here, there = ("x".join(map(str, item.shape)) for item in (own[name], value))
        if here != there:
            raise BadInput(f"{what} do not fit the recipe: {name!r} is {there} and should be {here}: {ADVICE}")
    with torch.no_grad():
        for name, value in saved.items():
            own[name].copy_(value)
