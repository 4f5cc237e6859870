"""Converts an optimiser's state to tensors and plain values, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = "groups"
OURS = ("params", "lr", "base_lr", "window")  # keys of a group that come from the recipe and the step


def state_tensors(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors for safetensors ("<index>/<key>") and plain values for JSON.

    bitsandbytes nests its quantised state one level deeper: "<index>/<key>/<inner key>". Values that an optimiser
    stores in its parameter groups (Prodigy's estimate, schedule-free's sums) are named "groups/<index>/<key>".
    """
    import torch

    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in (*_leaves(optimizer.state_dict()["state"]), *_changed(optimizer)):
        target: dict[str, Any] = tensors if isinstance(value, torch.Tensor) else values
        target[name] = value
    return tensors, values


def _leaves(state: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _changed(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """The groups' values that differ from the optimiser's defaults."""
    missing = object()
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key not in OURS and value is not (made := optimizer.defaults.get(key, missing)) and value != made:
                yield f"{GROUPS}/{index}/{key}", value


def load_state_tensors(optimizer: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """The inverse of `state_tensors`: restores the state, bit for bit, in an optimiser of the same parameters."""
    state: dict[Any, Any] = {}
    groups: list[tuple[int, str, Any]] = []
    for name, value in (tensors | values).items():
        index, *path, key = name.split("/")
        if index == GROUPS:
            groups.append((int(path[0]), key, value))
            continue
        inside = state.setdefault(int(index), {})
        for step in path:
            inside = inside.setdefault(step, {})
        inside[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    for number, key, value in groups:
        optimizer.param_groups[number][key] = value
