"""A stream with fewer samples than photos in a step: how many, which, and what they weigh, for any split of a step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_batches import InMemory, stream

from finetune.core.batch import Batch
from finetune.core.processes import Processes
from finetune.data.batches import Batches
from finetune.data.samplers import BucketSampler, Sample, ShuffleSampler


def three(weight: float = 0.5) -> list[list[Sample]]:
    """Photos 0-8, class images 20-24, and images of everything else 30-36."""
    classes = [replace(sample, role="class") for sample in stream(5, 20, 0.3)]
    others = [replace(sample, role="other") for sample in stream(7, 30, weight)]
    return [stream(9, 0), classes, others]


def parts_of(
    step: int, share: float, size: int = 4, accumulate: int = 1, world: int = 1, classes: float = 1
) -> list[Batch]:
    sampler = ShuffleSampler(three(), 4, size, {1: classes, 2: share})
    made = [Batches(sampler, InMemory(), accumulate, Processes(rank, world)) for rank in range(world)]
    return [batches.micro(step, index) for index in range(accumulate) for batches in made]


def numbers(batches: list[Batch], role: str) -> list[int]:
    return [int(batch.prompts[row]) for batch in batches for row in batch.rows_of(role)]


@pytest.mark.parametrize(
    ("size", "share", "counts"),
    [
        (4, 1, [4, 4, 4, 4, 4, 4]),
        (4, 0.25, [1, 1, 1, 1, 1, 1]),
        (4, 0.5, [2, 2, 2, 2, 2, 2]),
        (1, 0.5, [0, 1, 0, 1, 0, 1]),
        (2, 0.75, [1, 2, 1, 2, 1, 2]),
        (1, 0.3, [0, 0, 0, 1, 0, 0]),
    ],
)
def test_so_many_of_a_step(size: int, share: float, counts: list[int]) -> None:
    steps = [parts_of(step, share, size) for step in range(len(counts))]
    assert [len(numbers(step, "other")) for step in steps] == counts
    assert all(len(numbers(step, "photo")) == len(numbers(step, "class")) == size for step in steps)


@pytest.mark.parametrize("share", [1, 0.5, 0.3])
def test_every_image_once_an_epoch(share: float) -> None:
    seen = [number for step in range(60) for number in numbers(parts_of(step, share), "other")]
    assert len(seen) == round(60 * 4 * share)
    for start in range(0, len(seen) - 6, 7):
        assert Counter(seen[start : start + 7]) == Counter(range(30, 37))


@pytest.mark.parametrize("classes", [1, 0.5])
@pytest.mark.parametrize("share", [1, 0.75, 0.5, 0.25, 0.1])
@pytest.mark.parametrize(("accumulate", "world"), [(2, 1), (1, 2), (2, 2)])
def test_any_split_is_the_same_step(classes: float, share: float, accumulate: int, world: int) -> None:
    """The same samples with the same draws, and by their weights the mean error of each stream, times lambda."""
    errors = torch.rand(40, generator=torch.Generator().manual_seed(1))
    for step in range(6):
        (whole,) = parts_of(step, share, classes=classes)
        parts = parts_of(step, share, 4, accumulate, world, classes)
        assert len(numbers([whole], "class")) == 4 * classes
        for field in ("prompts", "keys", "names", "roles"):
            assert [value for part in parts for value in getattr(part, field)] == getattr(whole, field)
        means = [(errors[[int(text) for text in part.prompts]] * part.weight).mean() for part in parts]
        photos, kept, others = (errors[numbers(parts, role)].sum() / 4 for role in ("photo", "class", "other"))
        torch.testing.assert_close(torch.stack(means).mean(), photos + 0.3 * kept + 0.5 * others)


def test_without_such_a_stream_all_is_as_it_was() -> None:
    """Two streams: what each sample is, its position and its weight, by the rule of the versions before."""
    for sampler in (ShuffleSampler, BucketSampler):
        batch = Batches(sampler(three()[:2], 4, 3), InMemory()).micro(2, 0)
        assert [key.sample for key in batch.keys] == list(range(6))
        assert batch.weight.tolist() == [2.0, torch.tensor(0.6).item()] * 3
        assert batch.roles == ["photo", "class"] * 3


def test_buckets_give_padding_no_weight_in_any_stream() -> None:
    streams = three()
    batches = Batches(BucketSampler(streams, 4, 4, {2: 0.5}), InMemory())
    assert batches.samples_per_step == 12
    seen = [batches.micro(step, 0) for step in range(3)]  # nine photos in groups of four
    assert [len(batch.rows_of("other")) for batch in seen] == [2, 2, 2]
    padded = [batch for batch in seen if 0.0 in batch.weight.tolist()]
    assert len(padded) == 1
    kept = [float(padded[0].weight[row]) > 0 for row in padded[0].rows_of("other")]
    assert kept == [True, False]  # beside the first photo, and beside the third, which is padding


def test_a_part_of_a_batch() -> None:
    batch = Batches(ShuffleSampler(three(), 4, 4), InMemory()).micro(1, 0)
    rows = batch.rows_of("other")
    part = batch.part(rows)
    assert rows == [2, 5, 8, 11]
    assert batch.rows_without("other") == [0, 1, 3, 4, 6, 7, 9, 10]
    assert torch.equal(part.latents.mean, batch.latents.mean[rows])
    assert part.names == [batch.names[row] for row in rows]
    assert part.weight.tolist() == [1.5] * 4
    assert len(part) == 4
    assert replace(batch, roles=[]).rows_without("other") == list(range(12))
