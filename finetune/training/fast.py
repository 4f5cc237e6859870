"""`run.fast`: what makes a step faster without another result than rounding.

Modules become faster ones by their class, for as long as the loop runs; parameters, names and hooks stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import nn

from finetune.methods.layers.products import (
    MEMORY_SHARE,
    FrozenConv2d,
    FrozenLinear,
    can_pack,
    has_packed_convolutions,
    memory_of_machine,
)

CPU = torch.device("cpu")
LEAST_PARAMETERS = 100_000_000  # of the denoiser; below it there is little to gain (docs/speed.md)


def is_worthwhile(setting: str, device: torch.device, denoiser: nn.Module, compiled: bool = False) -> bool:
    """Whether `run.fast` (`on`, `off`, or `auto`: by its size) wants other kernels for this base. `auto` leaves GPUs
    as they are: nothing was measured there; and a compiler (`compiled`) fuses PEFT's layers there itself."""
    large = sum(parameter.numel() for parameter in denoiser.parameters()) >= LEAST_PARAMETERS
    on_gpu = setting == "on" and device.type == "cuda" and not compiled
    return on_gpu or (device.type == "cpu" and (setting == "on" or (setting == "auto" and large)))


def most_bytes(parts: Iterable[nn.Module], processes: int = 1) -> int:
    """At most so many bytes are held by the second form of the weights of frozen convolutions (0: it is not made), in
    each of so many processes on this machine."""
    modules = [module for part in parts for module in part.modules()]
    size = 2 * sum(module.weight.nbytes for module in modules if _is_convolution(module))
    return size if has_packed_convolutions() and size * processes <= memory_of_machine() / MEMORY_SHARE else 0


@contextmanager
def quickened(
    parts: Iterable[nn.Module], wanted: bool, processes: int = 1, device: torch.device = CPU
) -> Iterator[None]:
    """Inside the block, the frozen linear layers, convolutions and LoRA layers of `parts` compute faster on a CPU; on
    another `device` LoRA's linear layers do.

    `processes` share the machine's memory. Nothing happens unless `wanted`, nor on processors without AVX-512, where
    this was not measured.
    """
    changed = {}
    if wanted and device.type != "cpu":
        changed = dict(_fused_linear(parts))
    elif wanted and has_packed_convolutions():
        changed = dict(_choices(list(parts), processes))
    before = {module: type(module) for module in changed}
    for module, faster in changed.items():
        module.__class__ = faster
    try:
        yield
    finally:
        for module, own in before.items():
            if isinstance(module, FrozenConv2d):
                module.drop_packs()
            module.__class__ = own


def _fused_linear(parts: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """(module, its faster class) of the linear layers with a LoRA."""
    from finetune.methods.layers.fused_lora import FUSED, FusedLinear  # imports PEFT

    for module in (module for part in parts for module in part.modules()):
        if FUSED.get(type(module)) is FusedLinear:
            yield module, FusedLinear


def _choices(parts: Sequence[nn.Module], processes: int) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """(module, its faster class). Whatever has a class of its own, or is trained, stays as it is."""
    from finetune.methods.layers.fused_lora import FUSED  # imports PEFT

    modules = list(dict.fromkeys(module for part in parts for module in part.modules()))
    frozen = [m for m in modules if not any(p.requires_grad for p in m.parameters(recurse=False))]
    yield from ((m, FUSED[type(m)]) for m in modules if type(m) in FUSED)
    yield from ((m, FrozenLinear) for m in frozen if type(m) is nn.Linear)
    if most_bytes(parts, processes):
        yield from ((m, FrozenConv2d) for m in frozen if _is_convolution(m))


def _is_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a frozen convolution that `FrozenConv2d` can compute."""
    return type(module) is nn.Conv2d and not module.weight.requires_grad and can_pack(module)
