"""Dropout as a function of (seed, step, sample, layer), so that neither a resumed run nor more processes change it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finetune.core.rng import SampleKey


class SampleDropout(nn.Module):
    """`nn.Dropout` with one mask per sample, drawn where the tensor lies.

    Whoever trains says with `drawing` which samples the next forward passes are of; the first dimension of the
    input is the sample's. The same samples give the same mask again, as gradient checkpointing needs it.
    """

    _draws: list[SampleKey] | None = None  # of the class: a forward pass reaches every layer of every part

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p, self.name = p, name

    @classmethod
    def drawing(cls, draws: list[SampleKey] | None) -> None:
        cls._draws = draws

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> the same shape, each value zeroed with probability p and the rest divided by 1 - p."""
        if not self.training or self._draws is None:
            return x
        if len(self._draws) != len(x):
            raise ValueError(f"{self.name} got {len(x)} samples where the step has {len(self._draws)}")
        kept = [self._mask(draw, x[index]) for index, draw in enumerate(self._draws)]
        return x * torch.stack(kept) / (1 - self.p)

    def _mask(self, draw: SampleKey, like: Tensor) -> Tensor:
        seed = draw.generator(f"dropout {self.name}").initial_seed()
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.rand(like.shape, generator=generator, device=like.device) >= self.p


def replace_dropout(root: nn.Module, prefix: str) -> None:
    """Puts `SampleDropout` in the place of every active `nn.Dropout` below `root`."""
    for path, module in list(root.named_modules()):
        if isinstance(module, nn.Dropout) and module.p > 0:
            root.set_submodule(path, SampleDropout(module.p, f"{prefix}.{path}"))
