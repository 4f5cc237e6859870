"""Moves all tensors of a value to a device in one copy: CUDA's copies from ordinary memory make the CPU wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
RECORDING = threading.Lock()  # CUDA refuses to record a graph while another thread asks it for memory
ALIGNED = 64  # bytes: what vectorised kernels want of an address


def with_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """Returns `value` with `change` applied to every tensor in it, in dataclasses, dictionaries and lists."""
    held: Any = value
    if isinstance(held, Tensor):
        return change(held)  # type: ignore[return-value]
    if isinstance(held, dict):
        return {name: with_tensors(item, change) for name, item in held.items()}  # type: ignore[return-value]
    if isinstance(held, list):
        items = [with_tensors(item, change) for item in held]
        same = all(item is old for item, old in zip(items, held, strict=True))
        return value if same else items  # type: ignore[return-value]
    if is_dataclass(held) and not isinstance(held, type):
        inside = {field.name: getattr(held, field.name) for field in fields(held)}
        changed = {name: with_tensors(item, change) for name, item in inside.items()}
        new = {name: item for name, item in changed.items() if item is not inside[name]}
        return replace(held, **new) if new else value  # type: ignore[return-value]
    return value


@dataclass(frozen=True)
class Parcel(Generic[T]):
    """A value on the CPU, and the bytes of its tensors in one buffer. `starts`: id of a tensor -> its first byte.

    A tensor that is in the value twice is in the buffer once.
    """

    value: T
    buffer: Tensor
    starts: dict[int, int]

    @classmethod
    def of(cls, value: T, pinned: bool) -> Parcel[T]:
        """`pinned`: in memory from which CUDA copies while the CPU goes on."""
        starts: dict[int, int] = {}
        tensors: list[Tensor] = []
        size = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal size
            if id(tensor) not in starts:
                starts[id(tensor)] = size
                tensors.append(tensor)
                size += -(-tensor.nbytes // ALIGNED) * ALIGNED
            return tensor

        with_tensors(value, note)
        with RECORDING:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for tensor in tensors:
            _part(buffer, starts[id(tensor)], tensor).copy_(tensor)
        return cls(value, buffer, starts)

    def on(self, device: torch.device) -> T:
        """The value with its tensors on `device`. They share one piece of memory there."""
        there = self.buffer.to(device, non_blocking=True)
        return with_tensors(self.value, lambda tensor: _part(there, self.starts[id(tensor)], tensor))


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes from `start` on, as a tensor of the shape and dtype of `like`."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
