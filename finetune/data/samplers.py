"""Which sample stands where in a run: pure functions of (seed, step, pair), in one order for each shape of data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch

from finetune.core.rng import generator
from finetune.data.buckets import Size
from finetune.data.crops import Crop


@dataclass(frozen=True)
class Sample:
    """What is drawn from: a photo's crops and captions. `weight` multiplies its loss (lambda for class images)."""

    crops: list[Crop]
    captions: list[str]
    weight: float
    caption_dropout: float
    name: str

    def crops_of(self, size: Size) -> list[Crop]:
        return [crop for crop in self.crops if crop.size == size]


Streams = Sequence[Sequence[Sample]]


class Slot(NamedTuple):
    """A sample, those of its crops that fit into the step, and what its weight is multiplied by: 0 for padding."""

    sample: Sample
    crops: list[Crop]
    weight: float = 1.0


class ItemSampler(Protocol):
    """The order of a run: `batch_size` samples of each stream in a step."""

    streams: Streams
    seed: int
    batch_size: int

    def place(self, stream: int, step: int, pair: int) -> Slot:
        """The `pair`-th sample that `stream` gives to `step`."""
        ...


class ShuffleSampler:
    """Every image has the same size: each stream goes through its samples again and again, in a new order."""

    def __init__(self, streams: Streams, seed: int, batch_size: int) -> None:
        self.streams, self.seed, self.batch_size = streams, seed, batch_size

    def place(self, stream: int, step: int, pair: int) -> Slot:
        samples = self.streams[stream]
        epoch, position = divmod(step * self.batch_size + pair, len(samples))
        sample = samples[permutation(self.seed, "order", stream, epoch, len(samples))[position]]
        return Slot(sample, sample.crops)


class BucketSampler:
    """Every step has one size: that of its subject photos; class images are taken in the same size.

    An epoch of the subject goes bucket by bucket: the bucket's photos in a new order, cut into groups of
    `batch_size`; the groups of all buckets in a new order. A group that is not full is filled with repeats that count
    nothing, nor does the class image beside one, so that each photo counts once an epoch. Class images have their own
    order, as in `ShuffleSampler`.
    """

    def __init__(self, streams: Streams, seed: int, batch_size: int) -> None:
        self.streams, self.seed, self.batch_size = streams, seed, batch_size
        self.subject, self.others = streams[0], ShuffleSampler(streams, seed, batch_size)
        sizes = [sample.crops[0].size for sample in self.subject]
        self.members = [[k for k, own in enumerate(sizes) if own == size] for size in sorted(set(sizes))]
        self.groups = group_count([len(members) for members in self.members], batch_size)

    def place(self, stream: int, step: int, pair: int) -> Slot:
        group = self._group(step)
        weight = float(pair < len(group))  # of a class image too: lambda stays what it is beside each photo
        if stream == 0:
            sample = self.subject[group[pair % len(group)]]
            return Slot(sample, sample.crops, weight)
        sample = self.others.place(stream, step, pair).sample
        return Slot(sample, sample.crops_of(self.subject[group[0]].crops[0].size), weight)

    def _group(self, step: int) -> list[int]:
        """The subject photos of a step, by number: from one to `batch_size` of one bucket."""
        epoch, position = divmod(step, self.groups)
        number = permutation(self.seed, "groups", 0, epoch, self.groups)[position]
        for bucket, members in enumerate(self.members):
            own = group_count([len(members)], self.batch_size)
            if number < own:
                order = permutation(self.seed, "bucket", bucket, epoch, len(members))
                return [members[k] for k in order[number * self.batch_size : (number + 1) * self.batch_size]]
            number -= own
        raise IndexError(f"step {step} has no group")


def group_count(counts: Sequence[int], batch_size: int) -> int:
    """Steps of an epoch, for buckets with so many photos."""
    return sum(-(-count // batch_size) for count in counts)


@lru_cache(maxsize=64)
def permutation(seed: int, purpose: str, which: int, epoch: int, count: int) -> list[int]:
    """Each epoch's order: a permutation, so that everything comes once an epoch."""
    return torch.randperm(count, generator=generator(seed, purpose, which, epoch)).tolist()
