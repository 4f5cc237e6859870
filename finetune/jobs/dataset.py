"""The training data of a run: streams of samples, and caches of latents and prompt embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.files import cache_dir
from finetune.core.processes import ALONE, Processes
from finetune.core.rng import generator
from finetune.data.batches import Batches
from finetune.data.cache import CacheOptions, Encodable, LatentCache, PromptCache
from finetune.data.crops import make_crops
from finetune.data.masks import Masks
from finetune.data.mixes import tag_orders
from finetune.data.samplers import BucketSampler, Sample, ShuffleSampler
from finetune.families.base import Family
from finetune.jobs.class_sets import ClassSet, class_images
from finetune.jobs.prepare import Prepared, class_sets, other_set, used_others
from finetune.jobs.subjects import workers_of
from finetune.training.peers import joined
from finetune.training.priors.base import PriorSettings
from finetune.training.step import PromptEncoder


def cache_latents(job: Prepared, streams: Sequence[Sequence[Sample]]) -> LatentCache:
    """Returns a cache with the latents of every crop in `streams` and of every extra input image.

    Every process must call this: each encodes its share of what its disk lacks, then reads what the others encoded.
    """
    cache = LatentCache(cache_dir(), job.base_hash, encoding_dtype(job.family), cache_options(job))
    seen = [crop for stream in streams for sample in stream for crop in sample.crops]
    images: list[Encodable] = list(seen)
    if job.inputs is not None:
        images += [image for crop in seen for image in job.inputs.images(crop)]
    with phase("Latents", len(images), "images") as advance:
        if joined().world > 1:
            shares = joined().of_folder(cache.folder)
            different = list({image.key: image for image in images}.values())
            cache.fill(job.family, different[shares.rank :: shares.world])
            shares.wait()
        cache.fill(job.family, images, lambda amount: advance(amount, ""))
    return cache


def cache_options(job: Prepared) -> CacheOptions:
    """How this run's caches are filled. Photos in a folder are encoded one by one, unless `data.workers` is given:
    several encoders have one core each, which can change the last bits where one had several cores."""
    data, workers = job.recipe.data, workers_of(job.recipe.data)
    alone = data.workers is None and torch.get_num_threads() > 1 and not any(s.table for s in job.subjects)
    return CacheOptions(data.cache_dtype == "fp16", workers, 1 if alone else workers)


def load_masks(job: Prepared, streams: Sequence[Sequence[Sample]]) -> Masks | None:
    """Returns the loss masks of the photos (stream 0), or None if no photo has a mask."""
    if not job.masks:
        return None
    masks = Masks(job.masks, job.family.codec.factor, job.recipe.data.mask_floor)
    return masks.fill([crop for sample in streams[0] for crop in sample.crops])


def make_streams(job: Prepared) -> list[list[Sample]]:
    """Returns the streams of samples. Draws class images that are missing.

    Stream 0 holds the photos of all subjects. If the prior uses class images, the next one holds those of every noun,
    with their loss weighted by lambda (`prior.weight`). With `prior.others`, the last one holds the images of
    everything else.

    Raises:
        BadInput: the class images can't be used, see `class_images`.
    """
    data, seed = job.recipe.data, job.recipe.run.seed
    subject = []
    for number in trained_photos(job):
        photo, size = job.photos[number], job.sizes[number]
        crops = make_crops(photo, size, data.crop, data.crops, data.flip, seed)
        texts, shares = drawable_captions(job, number)
        many, weight = job.emphasis[number]
        sample = Sample(crops, texts, weight, data.caption_dropout, job.names[number], shares=shares)
        subject += [sample] * many
    classes = [sample for wanted in class_sets(job) for sample in _classes(job, wanted)]
    return [stream for stream in (subject, classes, _others(job)) if stream]


def trained_photos(job: Prepared) -> list[int]:
    """The indices in `job.photos` of those that are trained on, in their order."""
    unseen = held_out_photos(job)
    return [number for number in range(len(job.photos)) if number not in unseen]


def drawable_captions(job: Prepared, number: int) -> tuple[list[str], tuple[float, ...]]:
    """The captions of a photo of which each step draws one, and their shares (empty: equal).

    With `data.shuffle_tags` they are the drawn orders of its captions, which share what the caption had.
    """
    data, texts, shares = job.recipe.data, job.captions[number], job.shares[number]
    if not data.shuffle_tags:
        return texts, shares
    seed, trigger = job.recipe.run.seed, job.triggers[number]
    orders = [tag_orders(text, data.keep_tags, data.tag_orders, seed, trigger) for text in texts]
    whole = shares or (1.0,) * len(texts)
    parts = [share / len(each) for share, each in zip(whole, orders, strict=True) for _ in each]
    return [text for each in orders for text in each], tuple(parts)


def held_out_photos(job: Prepared) -> set[int]:
    """The indices in `job.photos` of those that are not trained on: `data.hold_out` of each subject, by the seed."""
    found: set[int] = set()
    start = 0
    for subject in job.subjects:
        count = len(subject.photos)
        order = torch.randperm(count, generator=generator(job.recipe.run.seed, "held out", start)).tolist()
        found |= {start + number for number in order[: job.recipe.data.hold_out]}
        start += count
    return found


def _classes(job: Prepared, wanted: ClassSet) -> list[Sample]:
    """The class images of a set, captioned with what they were drawn for."""
    prior = wanted.prior
    images = class_images(job.family, wanted, _shares(wanted))
    sizes = sorted(set(job.sizes))  # a class image is used in steps of every bucket
    of = f" of {wanted.noun or None}" if len(job.class_nouns) > 1 and not wanted.captions else ""
    return [
        Sample(
            [crop for size in sizes for crop in make_crops(image, size, "center", 1, prior.flip, job.recipe.run.seed)],
            [wanted.prompt_of(number)],
            prior.weight,
            prior.caption_dropout,
            f"class image {image.path.name}{of}",
            "class",
        )
        for number, image in enumerate(images)
    ]


def _others(job: Prepared) -> list[Sample]:
    """The images of everything else, each with the prompt that it was drawn for; empty without `prior.others`."""
    settings, wanted = job.recipe.prior.others, other_set(job)
    if settings is None or wanted is None:
        return []
    images, seed = class_images(job.family, wanted, joined().of_folder(wanted.folder)), job.recipe.run.seed
    sizes = sorted(set(job.sizes))
    return [
        Sample(
            [crop for size in sizes for crop in make_crops(images[number], size, "center", 1, False, seed)],
            [wanted.prompt_of(number)],
            settings.weight,
            0.0,
            f"other image {images[number].path.name}",
            "other",
        )
        for number in used_others(job, wanted)
    ]


def _shares(wanted: ClassSet) -> Processes:
    """The position of this process among those that draw into the same folder of class images.

    Raises:
        BadInput: not every machine has the user's own images.
    """
    peers = joined()
    owned = peers.gather(wanted.is_users_own())
    if any(owned) and not all(owned):
        raise BadInput(
            f"prior.folder {wanted.folder} has images for process {owned.index(True)} but none for process "
            f"{owned.index(False)}: copy them to every machine"
        )
    return ALONE if owned[0] else peers.of_folder(wanted.folder)


def make_batches(job: Prepared, streams: list[list[Sample]], cache: LatentCache) -> Batches:
    """Returns the batches of this process.

    Raises:
        BadInput: a step's samples can't be split evenly into micro-batches and processes.
    """
    run = job.recipe.run
    kind = BucketSampler if job.recipe.data.shape == "buckets" else ShuffleSampler
    sampler = kind(streams, run.seed, run.batch_size, _stream_shares(job.recipe.prior, len(streams)))
    masks = load_masks(job, streams)
    processes = Processes(joined().rank, joined().world, joined().wait)
    return Batches(sampler, cache, run.accumulate, processes, masks=masks, inputs=job.inputs)


def _stream_shares(prior: PriorSettings, count: int) -> dict[int, float]:
    """Stream -> its samples in a step for each photo. Class images come after the photos, everything else is last.
    Empty for photos alone."""
    classes, others = prior.class_images, prior.others
    own = [] if classes is None else [classes.share]
    own += [] if others is None else [others.share]
    return dict(enumerate(own, 1)) if count > 1 else {}


def make_prompt_encoder(job: Prepared, streams: Sequence[Sequence[Sample]]) -> PromptEncoder:
    """Returns the function that encodes prompts in a training step.

    If the text encoders are frozen, it reads a cache with the embeddings of every prompt. If they train, it runs them.
    """
    family = job.family
    if job.recipe.method.trains_texts(family):
        return family.encode_prompts
    prompts = [text for stream in streams for sample in stream for text in sample.captions]
    prompts += job.class_nouns  # the class prompts
    dtype = family.parts.dtype(family.text_encoders[0])
    cache = PromptCache(family, job.base_hash, cache_dir(), dtype, cache_options(job))
    different = list(dict.fromkeys(["", *prompts]))
    count = len(different) * len(family.text_encoders)
    with phase("Prompts", count, "texts") as advance:
        if joined().world > 1:
            shares = joined().of_folder(cache.folder)
            cache.fill(different[shares.rank :: shares.world])
            shares.wait()
        cache.fill(different, lambda amount: advance(amount, ""))
    return cache


def encoding_dtype(family: Family) -> torch.dtype:
    """The dtype in which images are encoded. Latents cached in another dtype are not used."""
    return family.parts.dtype(family.codec.parts[0]) if family.codec.parts else torch.float32
