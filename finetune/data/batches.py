"""Step number -> batch: the data plan. Everything is a function of (seed, step, sample).

DreamBooth (arXiv:2208.12242) is two streams: the subject's photos and the class images, side by side in every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.core.batch import Batch, Latents
from finetune.core.errors import BadInput
from finetune.core.processes import ALONE, Processes
from finetune.core.rng import SampleKey
from finetune.data.cache import Cache
from finetune.data.conditioning.base import Inputs
from finetune.data.crops import Crop
from finetune.data.masks import Masks
from finetune.data.samplers import ItemSampler, Sample, Streams

__all__ = ["Batches", "Cache", "Sample", "check_split"]


@dataclass(frozen=True)
class Drawn:
    """One sample of a batch."""

    key: SampleKey
    name: str
    crop: Crop
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
            sampler: which sample stands where: `ShuffleSampler` for images of one size, `BucketSampler` for several.
            cache: the latents of every crop.
            accumulate: the number of micro-batches in a step.
            processes: which part of a micro-batch is this process's.
            masks: the part of each image that counts; None where all of it does.
            inputs: what the base reads beside the latents; None for nothing.

        Raises:
            BadInput: a step's samples can't be split evenly.
        """
        check_split(sampler.batch_size, accumulate, processes.world)
        self.sampler, self.cache = sampler, cache
        self.accumulate, self.processes = accumulate, processes
        self.masks, self.inputs = masks, inputs

    @property
    def streams(self) -> Streams:
        return self.sampler.streams

    @property
    def samples_per_step(self) -> int:
        return self.sampler.batch_size * len(self.streams)

    def micro(self, step: int, index: int) -> Batch:
        """This process's part of micro-batch `index` of `step`."""
        processes = self.processes
        size = self.samples_per_step // (self.accumulate * processes.world)
        start = (index * processes.world + processes.rank) * size
        return self._batch([self._draw(step, slot) for slot in range(start, start + size)])

    def _draw(self, step: int, slot: int) -> Drawn:
        key = SampleKey(self.sampler.seed, step, slot)
        pair, stream = divmod(slot, len(self.streams))
        sample, crops, weight = self.sampler.place(stream, step, pair)
        picks = torch.rand(3, generator=key.generator("sample")).tolist()
        crop = crops[int(picks[0] * len(crops))]
        caption = sample.captions[int(picks[1] * len(sample.captions))]
        text = "" if picks[2] < sample.caption_dropout else caption
        return Drawn(key, sample.name, crop, text, sample.weight * len(self.streams) * weight)

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
        )

    def _prompt(self, item: Drawn) -> str:
        return item.caption if self.inputs is None else self.inputs.prompt(item.caption, item.key)

    def _conditions(self, drawn: list[Drawn]) -> dict[str, Tensor]:
        """What is made of the images themselves, by the families that are conditioned on it."""
        made = [self.cache.conditions(item.crop) for item in drawn]
        return {name: torch.stack([item[name] for item in made]) for name in made[0]}

    def _extra(self, drawn: list[Drawn]) -> Tensor | None:
        if self.inputs is None:
            return None
        return torch.stack([self.inputs.extra(item.crop, item.key, self.cache) for item in drawn])


def check_split(batch_size: int, accumulate: int, world: int) -> None:
    """Raises BadInput where a step's samples can't be dealt out evenly."""
    if batch_size % (accumulate * world):
        raise BadInput(
            f"run.batch_size {batch_size} can't be split into {accumulate} micro-batches on {world} processes: "
            f"choose a multiple of {accumulate * world}"
        )
