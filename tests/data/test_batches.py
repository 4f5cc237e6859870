"""The data plan with several samples a step, and with latents that are held in memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.core.batch import Latents
from finetune.core.processes import Processes
from finetune.data.batches import Batches
from finetune.data.crops import Crop, make_crops
from finetune.data.photos import Photo
from finetune.data.samplers import Sample, ShuffleSampler


class InMemory:
    """What a program with rendered pictures passes as its cache: anything with `latents`."""

    def __init__(self) -> None:
        self.values = torch.randn(40, 4, 2, 2, generator=torch.Generator().manual_seed(0))

    def conditions(self, view: Crop) -> dict[str, torch.Tensor]:
        return {}

    def latents(self, view: Crop) -> Latents:
        return Latents(self.values[int(view.photo.digest)], torch.zeros(4, 2, 2))


def stream(count: int, first: int, weight: float = 1.0) -> list[Sample]:
    """Samples whose only view and caption are told by their number."""
    photos = [Photo(Path(f"{k}.png"), (8, 8), str(k)) for k in range(first, first + count)]
    return [Sample(make_crops(p, 8, "center", 1, False, 0), [p.digest], weight, 0.0, p.path.name) for p in photos]


@pytest.mark.parametrize(("count", "batch_size"), [(5, 3), (4, 4), (3, 8), (7, 2)])
def test_each_stream_counts_its_own_epochs(count: int, batch_size: int) -> None:
    batches = Batches(ShuffleSampler([stream(count, 0), stream(11, 20)], 1, batch_size), InMemory())
    names = [name for step in range(22) for name in batches.micro(step, 0).names]
    for length, names_of_stream in ((count, names[0::2]), (11, names[1::2])):
        for start in range(0, len(names_of_stream) - length + 1, length):
            assert len(set(names_of_stream[start : start + length])) == length
        assert max(Counter(names_of_stream).values()) - min(Counter(names_of_stream).values()) <= 1


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[str]:
        batches = Batches(ShuffleSampler([stream(12, 0)], seed, 12), InMemory())
        return batches.micro(epoch, 0).names

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_one_template_is_drawn_each_time() -> None:
    """At random, as docs/recipes.md says: neither always the first, nor all of them one after the other."""
    texts = ["first", "second", "third"]
    (sample,) = stream(1, 0)
    batches = Batches(ShuffleSampler([[replace(sample, captions=texts)]], 0, 300), InMemory())
    drawn = batches.micro(0, 0).prompts
    assert all(70 <= Counter(drawn)[text] <= 130 for text in texts)
    assert drawn[:9] != texts * 3


def test_latents_captions_and_geometry_belong_together() -> None:
    cache = InMemory()
    batch = Batches(ShuffleSampler([stream(9, 0), stream(5, 20)], 4, 6), cache).micro(2, 0)
    assert len(batch) == 12
    for row, prompt in enumerate(batch.prompts):
        assert torch.equal(batch.latents.mean[row], cache.values[int(prompt)])
        assert batch.names[row] == f"{prompt}.png"
        assert batch.geometry[row].target == (8, 8)
    assert [draw.sample for draw in batch.keys] == list(range(12))
    assert {draw.step for draw in batch.keys} == {2}


@pytest.mark.parametrize(("weight", "accumulate", "world"), [(1.0, 1, 1), (0.3, 2, 1), (2.0, 1, 2), (0.3, 2, 2)])
def test_the_mean_over_all_parts_is_equation_2(weight: float, accumulate: int, world: int) -> None:
    """arXiv:2208.12242 eq. 2 over a step: mean subject error + lambda * mean class error, however it is cut."""
    sampler = ShuffleSampler([stream(9, 0), stream(5, 20, weight)], 4, 4)
    made = [Batches(sampler, InMemory(), accumulate, Processes(rank, world)) for rank in range(world)]
    parts = [batches.micro(3, index) for batches in made for index in range(accumulate)]
    errors = {str(number): torch.rand((), generator=torch.Generator().manual_seed(number)) for number in range(40)}
    part_means = [(torch.stack([errors[p] for p in part.prompts]) * part.weight).mean() for part in parts]
    prompts = [prompt for part in parts for prompt in part.prompts]
    subject = torch.stack([errors[prompt] for prompt in prompts if int(prompt) < 20])
    other = torch.stack([errors[prompt] for prompt in prompts if int(prompt) >= 20])
    assert len(subject) == len(other) == 4
    torch.testing.assert_close(torch.stack(part_means).mean(), subject.mean() + weight * other.mean())
