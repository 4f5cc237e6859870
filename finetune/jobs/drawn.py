"""What a plan says of draws: which caption a photo has in its first steps, and which photos count more than others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from finetune.core.rng import SampleKey
from finetune.data.batches import drawn_choice
from finetune.data.crops import Crop
from finetune.data.decoding import shown
from finetune.data.samplers import BucketSampler, Sample, ShuffleSampler
from finetune.jobs.dataset import drawable_captions, trained_photos
from finetune.jobs.prepare import Prepared

STEPS = 5  # of a photo that are shown
PHOTOS = 5  # that are shown
MOST = 20_000  # samples that are looked at; with very many photos the first ones may come too late to be found


def drawn_captions(job: Prepared) -> list[str]:
    """A line for each of the first photos: its caption in the first steps that see it. Empty where none is drawn.

    The draws are those of the run: by seed, step and sample.
    """
    numbers = trained_photos(job)[:PHOTOS]
    sampled = {job.names[number]: _sample(job, number) for number in numbers}
    if not any(len(set(sample.captions)) > 1 or sample.caption_dropout for sample in sampled.values()):
        return []
    found = _first_steps(job, sampled)
    return [f"{shown(name)}: {'; '.join(found[name]) or 'in no step'}" for name in sampled]


def _first_steps(job: Prepared, sampled: dict[str, Sample]) -> dict[str, list[str]]:
    run, streams = job.recipe.run, _stream_count(job)
    kind = BucketSampler if job.recipe.data.shape == "buckets" else ShuffleSampler
    sampler = kind([_places(job)], run.seed, run.batch_size)
    found: dict[str, list[str]] = {name: [] for name in sampled}
    left = dict.fromkeys(sampled, STEPS)
    for position in range(min(run.steps * run.batch_size, MOST)):
        step, pair = divmod(position, run.batch_size)
        slot = sampler.place(0, step, pair)
        sample = sampled.get(slot.sample.name)
        if sample is None or not slot.weight or not left[sample.name]:
            continue
        _, text = drawn_choice(sample, sample.crops, SampleKey(run.seed, step, pair * streams))
        found[sample.name].append(f"step {step + 1} {text!r}")
        left[sample.name] -= 1
        if not any(left.values()):
            break
    return found


def _stream_count(job: Prepared) -> int:
    """As many streams as `make_streams` gives, without drawing class images."""
    prior = job.recipe.prior
    return 1 + (prior.class_images is not None) + (prior.others is not None)


def _places(job: Prepared) -> list[Sample]:
    """The photos of an epoch, without their captions: those of 50,000 photos would take seconds."""
    empty = Sample([], [""], 1.0, 0.0, "")
    return [
        replace(empty, crops=[_whole(job, number)], name=job.names[number])
        for number in trained_photos(job)
        for _ in range(job.emphasis[number][0])
    ]


def _whole(job: Prepared, number: int) -> Crop:
    size = job.sizes[number]
    return Crop(job.photos[number], size, size, (0, 0), False)


def _sample(job: Prepared, number: int) -> Sample:
    texts, shares = drawable_captions(job, number)
    dropout = job.recipe.data.caption_dropout
    return Sample([_whole(job, number)], texts, 1.0, dropout, job.names[number], shares=shares)


def emphasis_lines(job: Prepared) -> list[str]:
    """A line for each number of repeats and weight but 1: how many photos have it, and the first of them."""
    pairs = [(job.emphasis[number], job.names[number]) for number in trained_photos(job)]
    counts = Counter(pair for pair, _ in pairs)
    if set(counts) <= {(1, 1.0)}:
        return []
    lines = []
    for (many, weight), count in sorted(counts.items()):
        names = [shown(name) for pair, name in pairs if pair == (many, weight)][:PHOTOS]
        more = ", ..." if count > len(names) else ""
        lines.append(f"{count} seen {many} times an epoch, with weight {weight:g} ({', '.join(names)}{more})")
    return lines
