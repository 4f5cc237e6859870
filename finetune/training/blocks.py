"""The blocks of a model whose weights are gathered together when it is cut (`run.shard`)."""

from __future__ import annotations

from torch import nn


def cut_blocks(part: nn.Module) -> list[nn.Module]:
    """The modules that the model names as those that are not split, inner ones first, and at the end the part itself,
    for what is in no block."""
    kinds = set(getattr(part, "_no_split_modules", None) or ())
    blocks = [module for module in part.modules() if module is not part and type(module).__name__ in kinds]
    return [*reversed(blocks), part]


def block_weights(part: nn.Module) -> list[list[nn.Parameter]]:
    """The weights of each of `cut_blocks`, without those of a block inside it."""
    taken: set[int] = set()
    found = []
    for block in cut_blocks(part):
        own = [weight for weight in block.parameters() if id(weight) not in taken]
        taken |= {id(weight) for weight in own}
        found.append(own)
    return found
