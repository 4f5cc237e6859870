"""`run.fast`: what makes a step on a CPU faster without another result than rounding.

Modules become faster ones by their class, for as long as the loop runs; parameters, names and hooks stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from finetune.methods.layers.products import (
    MEMORY_SHARE,
    FrozenConv2d,
    FrozenLinear,
    can_pack,
    has_packed_convolutions,
    memory_of_machine,
)


@contextmanager
def quickened(parts: Iterable[nn.Module], wanted: bool) -> Iterator[None]:
    """Inside the block, the frozen linear layers, convolutions and LoRA layers of `parts` compute faster on a CPU.

    Nothing happens unless `wanted`, and on processors without AVX-512, where this was not measured.
    """
    changed = dict(_choices(parts)) if wanted and has_packed_convolutions() else {}
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


def _choices(parts: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """(module, its faster class). Whatever has a class of its own, or is trained, stays as it is."""
    from finetune.methods.layers.fused_lora import FUSED  # imports PEFT

    modules = list(dict.fromkeys(module for part in parts for module in part.modules()))
    frozen = [m for m in modules if not any(p.requires_grad for p in m.parameters(recurse=False))]
    yield from ((m, FUSED[type(m)]) for m in modules if type(m) in FUSED)
    yield from ((m, FrozenLinear) for m in frozen if type(m) is nn.Linear)
    convolutions = [m for m in frozen if type(m) is nn.Conv2d and can_pack(m)]
    if 2 * sum(m.weight.nbytes for m in convolutions) <= memory_of_machine() / MEMORY_SHARE:
        yield from ((m, FrozenConv2d) for m in convolutions)
