"""Random draws that are functions of (seed, purpose, step, sample), never of history.

A resumed run, a run on two processes and an unbroken run on one all draw the same numbers, because
nothing here has a state: every draw makes its own generator from a hash of what it is for.
Everything is drawn on the CPU, so that the device does not change the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleKey:
    """One sample's place in a run: `sample` is its index in the global batch of `step`."""

    seed: int
    step: int
    sample: int

    def generator(self, purpose: str) -> torch.Generator:
        return generator(self.seed, purpose, self.step, self.sample)


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A fresh CPU generator for one purpose, e.g. `generator(seed, "order", epoch)`."""
    key = ":".join(str(part) for part in (seed, purpose, *counters))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(keys: Sequence[SampleKey], shape: Sequence[int], purpose: str) -> Tensor:
    """Standard normal noise [len(keys), *shape], float32, one generator per sample."""
    return torch.stack([torch.randn(tuple(shape), generator=key.generator(purpose)) for key in keys])


def uniform(keys: Sequence[SampleKey], purpose: str) -> Tensor:
    """Uniform numbers in [0, 1): shape [len(keys)], float32."""
    return torch.stack([torch.rand((), generator=key.generator(purpose)) for key in keys])
