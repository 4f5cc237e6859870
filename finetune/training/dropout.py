"""Dropout as a function of (seed, step, sample, layer), so that resuming and the number of processes do not change
it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.core.rng import SampleKey, derived_seed


@dataclass
class CurrentSamples:
    """The samples of the next forward passes; None while dropout is off. Each `Step` has one.

    `some`: those of `keys` that a penalty predicts alone; gradient checkpointing may ask for either again.
    """

    keys: list[SampleKey] | None = None
    some: list[SampleKey] | None = None

    def of(self, count: int) -> list[SampleKey] | None:
        """The samples of a forward pass of so many."""
        keys = self.keys
        if keys is not None and len(keys) != count and self.some is not None and len(self.some) == count:
            return self.some
        return keys

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        before, self.keys = self.keys, None
        try:
            yield
        finally:
            self.keys = before


class SampleDropout(nn.Module):
    """`nn.Dropout` with one mask for each sample, drawn on the input's device.

    A mask is a function of seed, step, sample, layer and kind of device: CUDA and CPU draw other numbers from a seed.
    `current` holds the samples of a forward pass, in the order of the input's first dimension. The same samples always
    get the same mask, which gradient checkpointing needs.
    """

    def __init__(self, p: float, name: str, current: CurrentSamples) -> None:
        super().__init__()
        self.p, self.name, self.current = p, name, current

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> the same shape, each value zeroed with probability p and the rest divided by 1 - p."""
        keys = self.current.of(len(x))
        if not self.training or keys is None:
            return x
        if len(keys) != len(x):
            raise ValueError(f"{self.name} got {len(x)} samples but the step has {len(keys)}")
        masks = [self._mask(key, x[index]) for index, key in enumerate(keys)]
        return x * torch.stack(masks) / (1 - self.p)

    def _mask(self, key: SampleKey, like: Tensor) -> Tensor:
        seed = derived_seed(key.seed, f"dropout {self.name}", key.step, key.sample)
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.rand(like.shape, generator=generator, device=like.device) >= self.p


def replace_dropout(root: nn.Module, prefix: str, current: CurrentSamples) -> None:
    """Replaces every active `nn.Dropout` inside `root` by `SampleDropout`."""
    for path, module in list(root.named_modules()):
        if isinstance(module, nn.Dropout) and module.p > 0:
            root.set_submodule(path, SampleDropout(module.p, f"{prefix}.{path}", current))
        elif isinstance(module, SampleDropout):
            module.current = current
