"""The exponential moving average (EMA) of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finetune.core.fitting import copy_fitting


class Ema:
    """ema += (1 - d) (weights - ema) after step n, with d = min(decay, (1 + n) / (10 + n)): the smaller d at the start
    keeps the initial weights from dominating the average of a short run.

    With `decay` None it stores nothing and changes nothing. `averages`: parameter name -> average, in fp32: in bf16 it
    would lose most of its small changes.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float | None) -> None:
        self.trained, self.decay = trained, decay
        self.averages: dict[str, Tensor] = {}
        if decay is not None:
            self.averages = {name: p.detach().to(_dtype(p), copy=True) for name, p in trained.items()}

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Sets the averages, from a checkpoint."""
        for name, value in averages.items():
            self.averages[name] = value.to(self.trained[name].device)

    def update(self, step: int) -> None:
        """Updates the averages after step `step`, counted from 0."""
        if self.decay is None:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = {name: parameter.detach() for name, parameter in self.trained.items()}
        for name in [name for name, value in weights.items() if value.dtype == torch.bfloat16]:
            self.averages[name].lerp_(weights.pop(name).float(), 1 - decay)  # one copy at a time
        if weights:
            torch._foreach_lerp_([self.averages[name] for name in weights], list(weights.values()), 1 - decay)

    def copy_to_weights(self) -> None:
        """Copies the averages into the trained parameters."""
        copy_into(self.trained, self.averages)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the trained parameters hold the averages; afterwards their old values, bit for bit."""
        kept = {name: self.trained[name].detach().clone() for name in self.averages}
        self.copy_to_weights()
        try:
            yield
        finally:
            copy_into(self.trained, kept)


def _dtype(parameter: Tensor) -> torch.dtype:
    return torch.float32 if parameter.dtype == torch.bfloat16 else parameter.dtype


def copy_into(trained: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """
    Raises:
        BadInput: the values are of other weights.
    """
    copy_fitting(trained, values)
