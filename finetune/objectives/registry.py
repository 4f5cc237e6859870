"""Training objectives. Every module here that defines an `Objective` is one: a new objective is one new file."""

from __future__ import annotations

from finetune.core.errors import BadInput
from finetune.core.registry import Registry
from finetune.objectives.base import Objective
from finetune.objectives.schedule import AnySchedule
from finetune.objectives.settings import ObjectiveSettings

OBJECTIVES: Registry[Objective] = Registry(Objective, "finetune.objectives", lambda item: item.__name__)


def objective_for(prediction: str) -> type[Objective]:
    """The objective class for what a base predicts."""
    return next(item for item in OBJECTIVES.values() if prediction in item.predictions)


def build_objective(settings: ObjectiveSettings, schedule: AnySchedule, shift: float = 1.0) -> Objective:
    """The objective for a base's `schedule`, with a recipe's settings. `shift` is the value of `auto`.

    Raises:
        BadInput: the recipe contradicts the base, or its shift is not above 0.
    """
    if settings.prediction not in ("auto", schedule.prediction):
        raise BadInput(
            f"objective.prediction is {settings.prediction!r} but the base was trained with "
            f"{schedule.prediction!r}: set it to auto"
        )
    chosen = shift if settings.shift == "auto" else settings.shift
    if chosen <= 0:
        raise BadInput(f"objective.shift is {chosen}: give a number above 0 (1 for none), or auto")
    return objective_for(schedule.prediction)(schedule, settings, chosen)
