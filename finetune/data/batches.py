"""Step number -> batch: the data plan. Everything is a function of (seed, step, sample).

DreamBooth (arXiv:2208.12242) is two streams: the subject's photos and the class images, side by side in every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.core.batch import Batch, Latents
from finetune.core.errors import BadInput
from finetune.core.rng import SampleKey
from finetune.data.cache import Cache
from finetune.data.conditioning.base import Inputs
from finetune.data.crops import Crop
from finetune.data.masks import Masks
from finetune.data.samplers import ItemSampler, Sample, ShuffleSampler, Streams

__all__ = ["Batches", "Cache", "Sample", "check_split"]


@dataclass(frozen=True)
class Drawn:
    """One sample of a batch."""

    draw: SampleKey
    name: str
    view: Crop
    caption: str
    weight: float


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
        streams: Streams,
        cache: Cache,
        seed: int,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        order: ItemSampler | None = None,
        masks: Masks | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        """`order`: None for pictures of one size (`Permutations`); `masks`: None where all of a picture counts."""
        check_split(batch_size, accumulate, world)
        self.streams, self.cache, self.seed = streams, cache, seed
        self.batch_size, self.accumulate, self.rank, self.world = batch_size, accumulate, rank, world
        self.order, self.masks = order or ShuffleSampler(streams, seed, batch_size), masks
        self.inputs = inputs  # None where the base reads latents alone

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * len(self.streams)

    def micro(self, step: int, index: int) -> Batch:
        """This process's part of micro-batch `index` of `step`."""
        size = self.samples_per_step // (self.accumulate * self.world)
        start = (index * self.world + self.rank) * size
        return self._batch([self._draw(step, slot) for slot in range(start, start + size)])

    def _draw(self, step: int, slot: int) -> Drawn:
        draw = SampleKey(self.seed, step, slot)
        pair, stream = divmod(slot, len(self.streams))
        sample, crops, counts = self.order.place(stream, step, pair)
        picks = torch.rand(3, generator=draw.generator("sample")).tolist()
        view = crops[int(picks[0] * len(crops))]
        caption = sample.captions[int(picks[1] * len(sample.captions))]
        text = "" if picks[2] < sample.caption_dropout else caption
        return Drawn(draw, sample.name, view, text, sample.weight * len(self.streams) * counts)

    def _batch(self, drawn: list[Drawn]) -> Batch:
        latents = [self.cache.latents(item.view) for item in drawn]
        return Batch(
            Latents(torch.stack([item.mean for item in latents]), torch.stack([item.std for item in latents])),
            [self._prompt(item) for item in drawn],
            torch.tensor([item.weight for item in drawn], dtype=torch.float32),
            [item.view.geometry for item in drawn],
            [item.draw for item in drawn],
            [item.name for item in drawn],
            None if self.masks is None else torch.stack([self.masks.mask(item.view) for item in drawn]),
            self._extra(drawn),
            self._conditions(drawn),
        )

    def _prompt(self, item: Drawn) -> str:
        return item.caption if self.inputs is None else self.inputs.prompt(item.caption, item.draw)

    def _conditions(self, drawn: list[Drawn]) -> dict[str, Tensor]:
        """What is made of the images themselves, by the families that are conditioned on it."""
        made = [self.cache.conditions(item.view) for item in drawn]
        return {name: torch.stack([item[name] for item in made]) for name in made[0]}

    def _extra(self, drawn: list[Drawn]) -> Tensor | None:
        if self.inputs is None:
            return None
        return torch.stack([self.inputs.extra(item.view, item.draw, self.cache) for item in drawn])


def check_split(batch_size: int, accumulate: int, world: int) -> None:
    """Raises BadInput where a step's samples can't be dealt out evenly."""
    if batch_size % (accumulate * world):
        raise BadInput(
            f"run.batch_size {batch_size} can't be split into {accumulate} micro-batches on {world} processes: "
            f"choose a multiple of {accumulate * world}"
        )
