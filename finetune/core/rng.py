"""Random numbers that depend only on (seed, purpose, step, sample), not on earlier draws.

An uninterrupted run, a resumed run and a run on two processes all draw the same numbers. Nothing here has a state:
every draw makes a new generator, seeded with a hash of its purpose and position. All numbers are drawn on the CPU, so
that they are the same on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleKey:
    """The position of one sample in a run: `sample` is its index in the global batch of `step`."""

    seed: int
    step: int
    sample: int

    def generator(self, purpose: str) -> torch.Generator:
        """Returns a new CPU generator for one purpose at this position."""
        return generator(self.seed, purpose, self.step, self.sample)


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """Returns a new CPU generator for one purpose, such as `generator(seed, "order", epoch)`.

    The same arguments always give a generator with the same numbers.
    """
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *counters))


def derived_seed(seed: int, purpose: str, *counters: int) -> int:
    """Returns the seed of `generator`, from 0 to 2**63 - 1, for a generator of another device."""
    key = ":".join(str(part) for part in (seed, purpose, *counters))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def normal(keys: Sequence[SampleKey], shape: Sequence[int], purpose: str) -> Tensor:
    """Returns standard normal noise [len(keys), *shape], float32, on the CPU. Each sample has its own generator."""
    return torch.stack([torch.randn(tuple(shape), generator=key.generator(purpose)) for key in keys])


def uniform(keys: Sequence[SampleKey], purpose: str) -> Tensor:
    """Returns uniform numbers in [0, 1), shape [len(keys)], float32, on the CPU. Each sample has its own generator."""
    return torch.stack([torch.rand((), generator=key.generator(purpose)) for key in keys])
