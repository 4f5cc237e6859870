"""Training objectives. Every module here that defines an `Objective` is one: a new objective is one new file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from finetune.errors import BadInput
from finetune.objectives.base import Objective, ObjectiveSettings
from finetune.objectives.schedule import AnySchedule, FlowSchedule, Schedule, read_schedule

__all__ = [
    "REGISTRY",
    "AnySchedule",
    "FlowSchedule",
    "Objective",
    "ObjectiveSettings",
    "Schedule",
    "build",
    "read_schedule",
]


def _discover() -> dict[str, type[Objective]]:
    """What a base predicts -> the objective that trains it."""
    found: dict[str, type[Objective]] = {}
    for module in pkgutil.iter_modules(__path__):
        for item in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if inspect.isclass(item) and issubclass(item, Objective) and not inspect.isabstract(item):
                found |= dict.fromkeys(item.predictions, item)
    return found


REGISTRY: dict[str, type[Objective]] = _discover()


def build(settings: ObjectiveSettings, schedule: AnySchedule, shift: float = 1.0) -> Objective:
    """The objective that a base's `schedule` asks for, with a recipe's settings; `shift` is what `auto` stands for.

    Raises:
        BadInput: the recipe contradicts the base.
    """
    if settings.prediction not in ("auto", schedule.prediction):
        raise BadInput(
            f"objective.prediction is {settings.prediction!r} but the base was trained with "
            f"{schedule.prediction!r}: leave it at auto"
        )
    chosen = shift if settings.shift == "auto" else settings.shift
    if chosen <= 0:
        raise BadInput(f"objective.shift is {chosen}: give a number above 0 (1 for none), or auto")
    return REGISTRY[schedule.prediction](schedule, settings, chosen)
