"""Reads one module's matrices from a LoRA file, and tells what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from finetune.export.lora.kohya import Pair


class Faulty(ValueError):
    """A module that can't be used. `fault` is a key of FAULTS, `of` fills the blank in its message.

    `sizes`: (in the file, in the base), as text, if it is a sound module of other sizes.
    """

    def __init__(self, fault: str, of: str = "", sizes: tuple[str, str] | None = None) -> None:
        super().__init__(fault)
        self.fault, self.of, self.sizes = fault, of, sizes


def pair_of(held: Mapping[str, Tensor], weight: torch.Size) -> Pair:
    """A module's (A, B) in fp32, in the shapes that suit `weight` [out, in(, k, k)], without a scale.

    Raises:
        Faulty: a matrix is missing, has a wrong shape, or holds what is no number.
    """
    missing = [role for role in ("a", "b") if role not in held]
    if missing:
        raise Faulty("one-matrix", "down" if missing == ["a"] else "up")
    if not held["a"].is_floating_point() or not held["b"].is_floating_point():
        raise Faulty("not-floating")
    a, b = held["a"].float(), held["b"].float()
    if held.get("alpha", torch.ones(1)).numel() != 1:
        raise Faulty("another-shape")
    fault = _shape_fault(a.shape, b.shape, weight)
    if fault:
        raise Faulty(fault, sizes=_sizes(a.shape, b.shape, weight) if fault == "another-shape" else None)
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise Faulty("not-finite")
    return a.reshape(len(a), *weight[1:]), b.reshape(*b.shape[:2], *([1] * (len(weight) - 2)))


def with_scale(pair: Pair, scale: float) -> Pair:
    """The pair with its scale in B.

    Raises:
        Faulty: the scale, or B with it, is not finite.
    """
    a, b = pair[0], pair[1] * scale if math.isfinite(scale) else pair[1]
    if not math.isfinite(scale) or not bool(torch.isfinite(b).all()):
        raise Faulty("not-finite")
    return a, b


def _shape_fault(a: torch.Size, b: torch.Size, weight: torch.Size) -> str:
    """A key of FAULTS; "" for none."""
    if len(a) < 2 or len(b) < 2 or not a.numel() or not b.numel():
        return "another-shape"
    if _suits(a, b, weight):
        return ""
    if _suits(b, a, weight):
        return "exchanged"
    if _suits(_turned(a), _turned(b), weight):
        return "transposed"
    narrow = len(weight) == 4 and max(weight[2:]) > 1 and a[1:].numel() == weight[1]
    if narrow and a[0] == b[1] and b[0] == weight[0]:
        return "one-by-one"
    return "another-shape"


def _suits(a: torch.Size, b: torch.Size, weight: torch.Size) -> bool:
    """Whether A and B are those of `weight`: same rank, input and output; a kernel only in A, and the same there."""
    kernel = len(a) != 4 or len(weight) != 4 or a[2:] == weight[2:]
    whole = a[0] == b[1] and b[0] == weight[0] and a[1:].numel() == weight[1:].numel()
    return whole and kernel and b[2:].numel() == 1


def _turned(size: torch.Size) -> torch.Size:
    return torch.Size([size[1], size[0], *size[2:]])


def _sizes(a: torch.Size, b: torch.Size, weight: torch.Size) -> tuple[str, str] | None:
    """(in the file, in the base) if A and B fit each other, and are a module of another size."""
    if len(a) < 2 or len(b) < 2 or not a.numel() or not b.numel() or a[0] != b[1]:
        return None
    return f"{a[1:].numel()} to {b[0]}", f"{weight[1:].numel()} to {weight[0]}"
