"""Chooses the samples of each step: functions of (seed, step, pair) only. One sampler for squares, one for buckets."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor
from typing import NamedTuple, Protocol

import torch

from finetune.core.batch import Role
from finetune.core.rng import generator
from finetune.data.buckets import Size
from finetune.data.crops import Crop


@dataclass(frozen=True)
class Sample:
    """An image's crops and captions; one of each is drawn. `weight` multiplies its loss (lambda for class images).

    `shares`: how often each caption is drawn, relative to the others; empty if all are drawn equally often.
    """

    crops: list[Crop]
    captions: list[str]
    weight: float
    caption_dropout: float
    name: str
    role: Role = "photo"
    shares: tuple[float, ...] = ()

    def crops_of(self, size: Size) -> list[Crop]:
        """Returns the crops of one size (width, height), in pixels."""
        return [crop for crop in self.crops if crop.size == size]


Streams = Sequence[Sequence[Sample]]


class Slot(NamedTuple):
    """A sample in a step, its crops of the step's size, and a factor for its loss weight: 0 for padding, else 1."""

    sample: Sample
    crops: list[Crop]
    weight: float = 1.0


class ItemSampler(Protocol):
    """The order of the samples in a run. Each step has `batch_size` samples of each stream, or fewer of some."""

    streams: Streams
    seed: int
    batch_size: int

    def has(self, stream: int, step: int, pair: int) -> bool:
        """Whether `step` has a sample of `stream` beside sample number `pair` of the photos."""
        ...

    def place(self, stream: int, step: int, pair: int) -> Slot:
        """Returns sample number `pair` (from 0) of `stream` in `step`."""
        ...


class ShuffleSampler:
    """For images of one size. Each stream repeats its samples, in a new random order in every epoch.

    `shares`: stream -> the number of its samples in a step, relative to `batch_size`; 1 if it is not named. Where that
    is no whole number, some steps have one more than others.
    """

    def __init__(
        self, streams: Streams, seed: int, batch_size: int, shares: Mapping[int, float] | None = None
    ) -> None:
        self.streams, self.seed, self.batch_size = streams, seed, batch_size
        self.shares = {stream: Fraction(str(share)) for stream, share in (shares or {}).items() if share != 1}

    def has(self, stream: int, step: int, pair: int) -> bool:
        """As `ItemSampler.has`: the samples of a step are spread evenly over its pairs."""
        return self._first(stream, step, pair + 1) > self._first(stream, step, pair)

    def _first(self, stream: int, step: int, pair: int) -> int:
        """The number of samples of a stream that come before a pair, from the first step on."""
        if stream not in self.shares:
            return step * self.batch_size + pair
        each = self.shares[stream] * self.batch_size
        before, after = floor(step * each), floor((step + 1) * each)
        return before + ceil(Fraction(pair * (after - before), self.batch_size))

    def place(self, stream: int, step: int, pair: int) -> Slot:
        """As `ItemSampler.place`: every sample once in an epoch, with all of its crops."""
        samples = self.streams[stream]
        epoch, position = divmod(self._first(stream, step, pair), len(samples))
        sample = samples[permutation(self.seed, "order", stream, epoch, len(samples))[position]]
        return Slot(sample, sample.crops)


class BucketSampler:
    """For images of several sizes. All images of a step have one size: that of its subject photos.

    In every epoch, each bucket's photos are shuffled and split into groups of `batch_size`, and the groups of all
    buckets are shuffled. A group that is not full is filled with repeats. A repeat and its class image have weight 0,
    so that each photo counts once in an epoch. Class images have their own order, as in `ShuffleSampler`.
    """

    def __init__(
        self, streams: Streams, seed: int, batch_size: int, shares: Mapping[int, float] | None = None
    ) -> None:
        self.streams, self.seed, self.batch_size = streams, seed, batch_size
        self.subject, self.others = streams[0], ShuffleSampler(streams, seed, batch_size, shares)
        sizes = [sample.crops[0].size for sample in self.subject]
        self.members = [[k for k, own in enumerate(sizes) if own == size] for size in sorted(set(sizes))]
        self.groups = group_count([len(members) for members in self.members], batch_size)

    def has(self, stream: int, step: int, pair: int) -> bool:
        """As `ItemSampler.has`."""
        return self.others.has(stream, step, pair)

    def place(self, stream: int, step: int, pair: int) -> Slot:
        """As `ItemSampler.place`: only crops of the step's size, with weight 0 for padding."""
        group = self._group(step)
        weight = float(
            pair < len(group)
        )  # for class images too, so that photos and class images keep their ratio lambda
        if stream == 0:
            sample = self.subject[group[pair % len(group)]]
            return Slot(sample, sample.crops, weight)
        sample = self.others.place(stream, step, pair).sample
        return Slot(sample, sample.crops_of(self.subject[group[0]].crops[0].size), weight)

    def _group(self, step: int) -> list[int]:
        """The indices of the subject photos of a step: 1 to `batch_size` photos of one bucket."""
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
    """Returns the number of steps in an epoch, for buckets with these numbers of photos."""
    return sum(-(-count // batch_size) for count in counts)


@lru_cache(maxsize=64)
def permutation(seed: int, purpose: str, which: int, epoch: int, count: int) -> Sequence[int]:
    """Returns the order of an epoch: a permutation of range(count) that depends only on the arguments.

    Of 100,000 samples it takes .4 MB; as a list it would take 4.
    """
    order = torch.randperm(count, generator=generator(seed, purpose, which, epoch))
    return array("I", order.to(torch.int32).numpy().tobytes())
