"""Reads the older form of `objective:`, in which all settings were keys at the same level.

`weighting: min_snr` with a separate `gamma: 3` is now `weighting: {kind: min_snr, gamma: 3}`. Recipes, overrides and
run folders of the older form still work, with bit-identical results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune.core.settings import Settings
from finetune.objectives.densities import DENSITIES
from finetune.objectives.loss import LOSSES
from finetune.objectives.weightings.registry import LOSS_WEIGHTS

OldKeys = dict[str, Any]

# the part to which a setting may have moved -> its kinds; the first is the default
PARTS: dict[str, tuple[Any, ...]] = {"weighting": LOSS_WEIGHTS, "density": DENSITIES, "loss": LOSSES}


@dataclass(frozen=True)
class Moved:
    """`objective.KEY` is now `objective.PART.NAME`. `advised` is a kind of that part with this setting."""

    key: str
    part: str
    name: str
    advised: str
    default: float | None

    @property
    def kinds(self) -> dict[str, bool]:
        """Kind of the part -> whether it has this setting."""
        return {default_kind(option): self.name in option.model_fields for option in PARTS[self.part]}


MOVED = (
    Moved("gamma", "weighting", "gamma", "min_snr", None),
    Moved("logit_mean", "density", "mean", "logit_normal", 0.0),
    Moved("logit_std", "density", "std", "logit_normal", 1.0),
    Moved("mode_scale", "density", "scale", "mode", 1.29),
    Moved("huber_c", "loss", "c", "huber", 0.1),
)


def new_form(values: OldKeys) -> OldKeys:
    """Converts an `objective:` section of the older form to today's. An older key at its default is left out.

    Raises:
        ValueError: an older key has no effect, or is given in both forms. pydantic shows its message.
    """
    found = dict(values)
    for moved, value in _asked(values):
        part = _part(found, moved)
        if moved.name in part:
            raise ValueError(
                f"objective.{moved.key} is the older form of objective.{moved.part}.{moved.name}, and both are given: "
                f"leave objective.{moved.key} out"
            )
        if not moved.kinds.get(part.get("kind", ""), True):
            raise ValueError(
                f"objective.{moved.key} is {value} but objective.{moved.part} is {part['kind']}, so it has no effect: "
                f"leave it out, or set objective.{moved.part}={moved.advised}"
            )
        found[moved.part] = part | {moved.name: value}
    return {key: value for key, value in found.items() if key not in {moved.key for moved in MOVED}}


def without_useless(values: OldKeys) -> OldKeys:
    """Removes the keys without an effect from an `objective:` section of the older form, which once allowed them."""
    useless = {
        moved.key for moved, _ in _asked(values) if not moved.kinds.get(_part(values, moved).get("kind", ""), True)
    }
    return {key: value for key, value in values.items() if key not in useless}


def forget_other_form(values: OldKeys, name: str) -> None:
    """Removes from an `objective:` section what an override of `objective.NAME` replaces in the other form."""
    for moved in MOVED:
        part = values.get(moved.part)
        if name == moved.key and isinstance(part, dict):
            part.pop(moved.name, None)
        if name == f"{moved.part}.{moved.name}":
            values.pop(moved.key, None)


def default_kind(option: type[Settings]) -> str:
    return str(option.model_fields["kind"].default)


def _asked(values: OldKeys) -> Iterator[tuple[Moved, Any]]:
    """The older keys with an effect, and their values. A key at its default counts only if today's form is given
    too."""
    for moved in MOVED:
        value, part = values.get(moved.key, moved.default), _part(values, moved)
        if part and (value != moved.default or (moved.key in values and moved.name in part)):
            yield moved, value


def _part(values: OldKeys, moved: Moved) -> OldKeys:
    """The part to which the key moved, as a dictionary; empty if it is not a valid part (pydantic reports that)."""
    part = values.get(moved.part, default_kind(PARTS[moved.part][0]))
    if isinstance(part, Settings):
        return part.model_dump()
    if isinstance(part, str):
        return {"kind": part}
    return part if isinstance(part, dict) and isinstance(part.get("kind", ""), str) else {}
