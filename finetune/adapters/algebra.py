"""Sums of adapters, lower ranks, and the difference of two models as an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from finetune.core.errors import BadInput
from finetune.export.base import Adapter
from finetune.export.decompose import (
    Difference,
    Kept,
    beyond,
    decompose,
    factors_at_rank,
    kept_energy,
    rank_for_energy,
    svd_of_product,
)
from finetune.families.base import Family


def resize(adapter: Adapter, rank: int | None = None, energy: float | None = None) -> tuple[Adapter, Kept]:
    """Reduces every module to `rank`, or to the smallest rank that keeps `energy` (0 to 1) of its squared singular
    values. Returns the new adapter (its scale is 1), and how much of the old one it holds."""
    layers: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    spectra: dict[str, tuple[Tensor, int]] = {}
    for part, module, a, b in adapter.modules():
        u, s, v = svd_of_product(b.flatten(1) * adapter.scale, a.flatten(1))
        r = rank_for_energy(s, rank, energy)
        layers.setdefault(part, {})[module] = factors_at_rank(u, s, v, r, a, b)
        spectra[f"{part}.{module}"] = (s, r)
    return replace(adapter, layers=layers, scale=1.0), kept_energy(spectra)


def combine(weighted: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The weighted sum of (adapter, weight) pairs. It is exact: the ranks of a module add up, and the scale is 1.

    Raises:
        BadInput: the adapters belong to different families.
    """
    names = {adapter.family for adapter, _ in weighted}
    if len(names) != 1:
        raise BadInput(f"adapters of {' and '.join(sorted(names))} can't be added: give adapters of one family")
    layers: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for adapter, weight in weighted:
        for part, module, a, b in adapter.modules():
            held = layers.setdefault(part, {})
            pair = (a, b * (adapter.scale * weight))
            if module in held:
                pair = (torch.cat([held[module][0], pair[0]]), torch.cat([held[module][1], pair[1]], 1))
            held[module] = pair
    known = any(not adapter.alike for adapter, _ in weighted)  # one that tells its base tells it for all
    first = weighted[0][0]
    return replace(first, layers=layers, scale=1.0, alike=() if known else first.alike)


def extract(base: Family, tuned: Family, rank: int) -> tuple[Adapter, Kept]:
    """The difference `tuned` - `base` as a LoRA of `rank`, for every linear layer and convolution that changed.

    Returns the adapter, and how much of the difference it holds.

    Raises:
        BadInput: the models have different families or shapes, or the same weights.
    """
    moved = Difference(base, tuned)
    found = decompose(moved.layers(), rank)
    left_out, _ = beyond(moved, found)
    if not found.spectra:
        same = left_out or "the model and the base have the same weights"
        raise BadInput(f"{same}: there is nothing to extract")
    kept = replace(found.kept(rank), left_out=left_out)
    return Adapter(base.name, base.folder, found.layers(rank), 1.0), kept
