"""Dropout as a function of (seed, step, sample, layer), so that neither a resumed run nor more processes change it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.core.rng import SampleKey


@dataclass
class CurrentSamples:
    """The samples that the next forward passes are of; None while nothing is to be dropped. One for each `Step`."""

    keys: list[SampleKey] | None = None

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        before, self.keys = self.keys, None
        try:
            yield
        finally:
            self.keys = before


class SampleDropout(nn.Module):
    """`nn.Dropout` with one mask per sample, drawn where the tensor lies.

    `current` says which samples a forward pass is of; the first dimension of the input is the sample's. The same
    samples give the same mask again, as gradient checkpointing needs it.
    """

    def __init__(self, p: float, name: str, current: CurrentSamples) -> None:
        super().__init__()
        self.p, self.name, self.current = p, name, current

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> the same shape, each value zeroed with probability p and the rest divided by 1 - p."""
        keys = self.current.keys
        if not self.training or keys is None:
            return x
        if len(keys) != len(x):
            raise ValueError(f"{self.name} got {len(x)} samples where the step has {len(keys)}")
        masks = [self._mask(key, x[index]) for index, key in enumerate(keys)]
        return x * torch.stack(masks) / (1 - self.p)

    def _mask(self, key: SampleKey, like: Tensor) -> Tensor:
        seed = key.generator(f"dropout {self.name}").initial_seed()
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.rand(like.shape, generator=generator, device=like.device) >= self.p


def replace_dropout(root: nn.Module, prefix: str, current: CurrentSamples) -> None:
    """Puts `SampleDropout` in the place of every active `nn.Dropout` below `root`."""
    for path, module in list(root.named_modules()):
        if isinstance(module, nn.Dropout) and module.p > 0:
            root.set_submodule(path, SampleDropout(module.p, f"{prefix}.{path}", current))
        elif isinstance(module, SampleDropout):
            module.current = current
