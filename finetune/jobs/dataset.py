"""The training data of a run: streams of samples, and caches of latents and prompt embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from finetune.core.events import phase
from finetune.core.files import cache_dir
from finetune.core.processes import Processes
from finetune.data.batches import Batches
from finetune.data.cache import Encodable, LatentCache, PromptCache
from finetune.data.crops import make_crops
from finetune.data.masks import Masks
from finetune.data.samplers import BucketSampler, Sample, ShuffleSampler
from finetune.families.base import Family
from finetune.jobs.class_sets import ClassSet, class_images
from finetune.jobs.prepare import Prepared, class_sets
from finetune.training.step import PromptEncoder


def cache_latents(job: Prepared, streams: Sequence[Sequence[Sample]], accelerator: Accelerator) -> LatentCache:
    """Returns a cache with the latents of every crop in `streams` and of every extra input image.

    Every process must call this: the main process encodes first, and the others then read its files.
    """
    cache = LatentCache(cache_dir(), job.base_hash, _encoding_dtype(job.family))
    seen = [crop for stream in streams for sample in stream for crop in sample.crops]
    images: list[Encodable] = list(seen)
    if job.inputs is not None:
        images += [image for crop in seen for image in job.inputs.images(crop)]
    with phase("Latents", len(images)) as advance, accelerator.main_process_first():
        cache.fill(job.family, images, lambda amount: advance(amount, ""))
    return cache


def load_masks(job: Prepared, streams: Sequence[Sequence[Sample]]) -> Masks | None:
    """Returns the loss masks of the photos (stream 0), or None if no photo has a mask."""
    if not job.masks:
        return None
    masks = Masks(job.masks, job.family.codec.factor, job.recipe.data.mask_floor)
    return masks.fill([crop for sample in streams[0] for crop in sample.crops])


def make_streams(job: Prepared, accelerator: Accelerator) -> list[list[Sample]]:
    """Returns the streams of samples. Draws class images that are missing.

    Stream 0 holds the photos of all subjects. If the prior uses class images, stream 1 holds those of every noun, with
    their loss weighted by lambda (`prior.weight`).

    Raises:
        BadInput: the class images can't be used, see `class_images`.
    """
    data, images, seed = job.recipe.data, job.recipe.prior.class_images, job.recipe.run.seed
    subject = [
        Sample(
            make_crops(photo, size, data.crop, data.crops, data.flip, seed),
            texts,
            1.0,
            data.caption_dropout,
            name,
        )
        for photo, size, texts, name in zip(job.photos, job.sizes, job.captions, job.names, strict=True)
    ]
    if images is None:
        return [subject]
    return [subject, [sample for wanted in class_sets(job) for sample in _classes(job, wanted, accelerator)]]


def _classes(job: Prepared, wanted: ClassSet, accelerator: Accelerator) -> list[Sample]:
    """The class images of a set, captioned with what they were drawn for."""
    prior = wanted.prior
    images = class_images(job.family, wanted, _processes(accelerator))
    sizes = sorted(set(job.sizes))  # a class image is used in steps of every bucket
    of = f" of {wanted.noun or None}" if len(job.class_nouns) > 1 and not wanted.captions else ""
    return [
        Sample(
            [crop for size in sizes for crop in make_crops(image, size, "center", 1, prior.flip, job.recipe.run.seed)],
            [wanted.prompt_of(number)],
            prior.weight,
            prior.caption_dropout,
            f"class image {image.path.name}{of}",
        )
        for number, image in enumerate(images)
    ]


def make_batches(job: Prepared, streams: list[list[Sample]], cache: LatentCache, accelerator: Accelerator) -> Batches:
    """Returns the batches of this process.

    Raises:
        BadInput: a step's samples can't be split evenly into micro-batches and processes.
    """
    run = job.recipe.run
    kind = BucketSampler if job.recipe.data.shape == "buckets" else ShuffleSampler
    sampler = kind(streams, run.seed, run.batch_size)
    masks = load_masks(job, streams)
    return Batches(sampler, cache, run.accumulate, _processes(accelerator), masks=masks, inputs=job.inputs)


def _processes(accelerator: Accelerator) -> Processes:
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)


def make_prompt_encoder(job: Prepared, streams: Sequence[Sequence[Sample]], accelerator: Accelerator) -> PromptEncoder:
    """Returns the function that encodes prompts in a training step.

    If the text encoders are frozen, it reads a cache with the embeddings of every prompt. If they train, it runs them.
    """
    family = job.family
    if job.recipe.method.trains_texts(family):
        return family.encode_prompts
    prompts = [text for stream in streams for sample in stream for text in sample.captions]
    prompts += job.class_nouns  # the class prompts
    cache = PromptCache(family, job.base_hash, cache_dir(), family.parts.dtype(family.text_encoders[0]))
    with accelerator.main_process_first():
        cache.fill(list(dict.fromkeys(["", *prompts])))
    return cache


def _encoding_dtype(family: Family) -> torch.dtype:
    """The dtype in which images are encoded. Latents cached in another dtype are not used."""
    return family.parts.dtype(family.codec.parts[0]) if family.codec.parts else torch.float32
