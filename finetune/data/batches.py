"""Step number -> batch: the data plan. Everything is a function of (seed, step, sample).

DreamBooth (arXiv:2208.12242) is two streams: the subject's photos and the class images, side by side in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from finetune.batch import Batch, Latents
from finetune.data.cache import Cache
from finetune.data.inputs import Inputs
from finetune.data.views import View
from finetune.draws import Draw, generator
from finetune.errors import BadInput


@dataclass(frozen=True)
class Sample:
    """What is drawn from: a photo's views and captions. `weight` multiplies its loss (lambda for class images)."""

    views: list[View]
    captions: list[str]
    weight: float
    caption_dropout: float
    name: str


class Batches:
    """The batches of one process.

    A step's global batch holds `batch_size` samples of each stream, interleaved: (subject, class), (subject, class),
    ... It is cut into `accumulate` micro-batches and those into `world` equal parts, so that the union is the same
    for any cut.

    The mean over a batch of weight * error is the paper's sum: with k streams each sample's weight is k times its
    own, so that (1/kB) sum k w_i e_i = (1/B) sum (subject error + lambda * class error).
    """

    def __init__(
        self,
        streams: Sequence[Sequence[Sample]],
        cache: Cache,
        seed: int,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        inputs: Inputs | None = None,
    ) -> None:
        check_split(batch_size, accumulate, world)
        self.streams, self.cache, self.seed = streams, cache, seed
        self.batch_size, self.accumulate, self.rank, self.world = batch_size, accumulate, rank, world
        self.inputs = inputs  # None where the base reads latents alone

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * len(self.streams)

    def micro(self, step: int, index: int) -> Batch:
        """This process's part of micro-batch `index` of `step`."""
        size = self.samples_per_step // (self.accumulate * self.world)
        start = (index * self.world + self.rank) * size
        return self._batch([self._draw(step, slot) for slot in range(start, start + size)])

    def _draw(self, step: int, slot: int) -> tuple[Draw, Sample, View, str]:
        draw = Draw(self.seed, step, slot)
        pair, stream = divmod(slot, len(self.streams))
        samples = self.streams[stream]
        epoch, position = divmod(step * self.batch_size + pair, len(samples))
        sample = samples[_order(self.seed, stream, epoch, len(samples))[position]]
        picks = torch.rand(3, generator=draw.generator("sample")).tolist()
        view = sample.views[int(picks[0] * len(sample.views))]
        caption = sample.captions[int(picks[1] * len(sample.captions))]
        return draw, sample, view, "" if picks[2] < sample.caption_dropout else caption

    def _extra(self, views: list[View], draws: list[Draw]) -> Tensor | None:
        if self.inputs is None:
            return None
        return torch.stack([self.inputs.extra(v, d, self.cache) for v, d in zip(views, draws, strict=True)])

    def _batch(self, drawn: list[tuple[Draw, Sample, View, str]]) -> Batch:
        latents = [self.cache.latents(view) for _, _, view, _ in drawn]
        weights = [sample.weight * len(self.streams) for _, sample, _, _ in drawn]
        return Batch(
            Latents(torch.stack([item.mean for item in latents]), torch.stack([item.std for item in latents])),
            [caption if self.inputs is None else self.inputs.prompt(caption, draw) for draw, *_, caption in drawn],
            torch.tensor(weights, dtype=torch.float32),
            [view.geometry for _, _, view, _ in drawn],
            [draw for draw, *_ in drawn],
            [sample.name for _, sample, _, _ in drawn],
            self._extra([view for _, _, view, _ in drawn], [draw for draw, *_ in drawn]),
        )


@lru_cache(maxsize=64)
def _order(seed: int, stream: int, epoch: int, count: int) -> list[int]:
    """Each epoch's order: a permutation, so that every photo is seen once an epoch."""
    return torch.randperm(count, generator=generator(seed, "order", stream, epoch)).tolist()


def check_split(batch_size: int, accumulate: int, world: int) -> None:
    """Raises BadInput where a step's samples can't be dealt out evenly."""
    if batch_size % (accumulate * world):
        raise BadInput(
            f"run.batch_size {batch_size} can't be split into {accumulate} micro-batches on {world} processes: "
            f"choose a multiple of {accumulate * world}"
        )
