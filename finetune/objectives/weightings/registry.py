"""Loss weights by name. Every module here that defines a `Weighting` with a `kind` is one: a new one is a new file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.core.registry import Registry
from finetune.core.settings import chosen_by_kind
from finetune.objectives.weightings.base import Unweighted, Weighting

WEIGHTINGS: Registry[Weighting] = Registry(
    Weighting, "finetune.objectives.weightings", lambda item: item.model_fields["kind"].default
)


# the type of a recipe's `objective.weighting`: `kind` chooses the class
LOSS_WEIGHTS: tuple[Any, ...] = (Unweighted, *WEIGHTINGS.values())
if TYPE_CHECKING:
    LossWeight = Unweighted | Weighting
else:
    LossWeight = chosen_by_kind(*LOSS_WEIGHTS)
