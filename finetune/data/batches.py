"""Builds the batch of each step. Every choice is a function of (seed, step, sample).

DreamBooth (arXiv:2208.12242) uses two streams: every step has samples of the subject's photos and of the class images.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate as sums

import torch
from torch import Tensor

from finetune.core.batch import Batch, Latents, Role
from finetune.core.errors import BadInput
from finetune.core.processes import ALONE, Processes
from finetune.core.rng import SampleKey
from finetune.data.cache import Cache
from finetune.data.conditioning.base import Inputs
from finetune.data.crops import Crop
from finetune.data.masks import Masks
from finetune.data.samplers import ItemSampler, Sample, Streams

__all__ = ["Batches", "Cache", "Sample", "check_split", "drawn_choice"]


@dataclass(frozen=True)
class Drawn:
    """One sample of a batch, with its crop and caption chosen."""

    key: SampleKey
    name: str
    crop: Crop
    caption: str
    weight: float
    role: Role


class Batches:
    """The batches of one process.

    A step's global batch holds `batch_size` samples of each stream, interleaved: (subject, class), (subject, class),
    ... Of a stream with a smaller share (`ItemSampler.has`), only some pairs have one. The batch is split into
    `accumulate` micro-batches, and each of those into `world` parts with as many pairs. All parts together are the
    same samples for any split.

    The mean over a batch of weight * error equals the paper's sum: with k streams each sample's weight is multiplied
    by k, so that (1/kB) sum k w_i e_i = (1/B) sum (subject error + lambda * class error). In a part of n samples for p
    pairs it is n/p instead of k: the mean over parts is then the same for any split.
    """

    def __init__(
        self,
        sampler: ItemSampler,
        cache: Cache,
        accumulate: int = 1,
        processes: Processes = ALONE,
        *,
        masks: Masks | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        """
        Args:
            sampler: chooses the samples: `ShuffleSampler` for one image size, `BucketSampler` for several.
            cache: the latents of every crop.
            accumulate: the number of micro-batches in a step.
            processes: the position of this process, which decides its part of each micro-batch.
            masks: the loss weight of each latent; None if all count equally.
            inputs: the extra inputs of the base; None if it has none.

        Raises:
            BadInput: a step's samples can't be split evenly.
        """
        check_split(sampler.batch_size, accumulate, processes.world)
        self.sampler, self.cache = sampler, cache
        self.accumulate, self.processes = accumulate, processes
        self.masks, self.inputs = masks, inputs

    @property
    def streams(self) -> Streams:
        """The streams of samples."""
        return self.sampler.streams

    @property
    def samples_per_step(self) -> int:
        """The largest number of samples in a step, over all streams and processes."""
        return self.sampler.batch_size * len(self.streams)

    def micro(self, step: int, index: int) -> Batch:
        """Returns this process's part of micro-batch `index` (from 0) of `step`.

        It holds at most samples_per_step / (accumulate * world) samples, on the CPU.
        """
        processes, count = self.processes, len(self.streams)
        pairs = self.sampler.batch_size // (self.accumulate * processes.world)
        first = (index * processes.world + processes.rank) * pairs
        places = [(stream, pair) for pair in range(first, first + pairs) for stream in range(count)]
        there = [(stream, pair) for stream, pair in places if self.sampler.has(stream, step, pair)]
        factor = len(there) / pairs
        return self._batch([self._draw(step, *place, factor) for place in there])

    def of(self, drawn: Drawn) -> Batch:
        """Returns a batch of one sample that the caller has drawn, on the CPU. Its latents must be in the cache."""
        return self._batch([drawn])

    def _draw(self, step: int, stream: int, pair: int, factor: float) -> Drawn:
        key = SampleKey(self.sampler.seed, step, pair * len(self.streams) + stream)
        sample, crops, weight = self.sampler.place(stream, step, pair)
        crop, text = drawn_choice(sample, crops, key)
        return Drawn(key, sample.name, crop, text, sample.weight * factor * weight, sample.role)

    def _batch(self, drawn: list[Drawn]) -> Batch:
        latents = [self.cache.latents(item.crop) for item in drawn]
        return Batch(
            latents=Latents(torch.stack([item.mean for item in latents]), torch.stack([item.std for item in latents])),
            prompts=[self._prompt(item) for item in drawn],
            weight=torch.tensor([item.weight for item in drawn], dtype=torch.float32),
            geometry=[item.crop.geometry for item in drawn],
            keys=[item.key for item in drawn],
            names=[item.name for item in drawn],
            mask=None if self.masks is None else torch.stack([self.masks.mask(item.crop) for item in drawn]),
            extra=self._extra(drawn),
            conditions=self._conditions(drawn),
            roles=[item.role for item in drawn],
        )

    def _prompt(self, item: Drawn) -> str:
        return item.caption if self.inputs is None else self.inputs.prompt(item.caption, item.key)

    def _conditions(self, drawn: list[Drawn]) -> dict[str, Tensor]:
        """The conditions [B, ...] that some families compute from the images."""
        made = [self.cache.conditions(item.crop) for item in drawn]
        return {name: torch.stack([item[name] for item in made]) for name in made[0]}

    def _extra(self, drawn: list[Drawn]) -> Tensor | None:
        if self.inputs is None:
            return None
        return torch.stack([self.inputs.extra(item.crop, item.key, self.cache) for item in drawn])


def drawn_choice(sample: Sample, crops: Sequence[Crop], key: SampleKey) -> tuple[Crop, str]:
    """The crop and the caption of a sample at one position of a run; the caption is empty where it is dropped."""
    picks = torch.rand(3, generator=key.generator("sample")).tolist()
    crop = crops[int(picks[0] * len(crops))]
    if sample.shares:
        ends = list(sums(sample.shares))
        number = min(bisect_right(ends, picks[1] * ends[-1]), len(ends) - 1)
    else:
        number = int(picks[1] * len(sample.captions))
    return crop, "" if picks[2] < sample.caption_dropout else sample.captions[number]


def check_split(batch_size: int, accumulate: int, world: int) -> None:
    """Checks that a step's samples can be split evenly.

    Raises:
        BadInput: `batch_size` is not a multiple of `accumulate` * `world`.
    """
    if batch_size % (accumulate * world):
        raise BadInput(
            f"run.batch_size {batch_size} can't be split into {accumulate} micro-batches on {world} processes: "
            f"choose a multiple of {accumulate * world}"
        )
