"""Optimisers by kind, and the learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def state_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimiser's state as tensors for safetensors ("<index>/<key>") and plain values for JSON.

    bitsandbytes nests its quantised state one level deeper: "<index>/<key>/<inner key>".
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in _leaves(optimizer.state_dict()["state"]):
        target: dict[str, Any] = tensors if isinstance(value, torch.Tensor) else values
        target[name] = value
    return tensors, values


def _leaves(state: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def load_state_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], values: dict[str, Any]
) -> None:
    """The inverse of `state_tensors`: bit-exact, on an optimiser over the same parameters."""
    state: dict[Any, Any] = {}
    for name, value in (tensors | values).items():
        index, *path, key = name.split("/")
        inside = state.setdefault(int(index), {})
        for step in path:
            inside = inside.setdefault(step, {})
        inside[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
