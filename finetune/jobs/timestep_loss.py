"""Measures where, along the noise levels, a run learned: the loss on its photos with fixed noise, before and after.

Both are measured on models as they draw: the base before training, and afterwards what the exported file makes of it.
So training itself measures nothing, and methods need not be switched off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from finetune.core.batch import Geometry
from finetune.core.events import phase
from finetune.core.files import cache_dir
from finetune.core.rng import SampleKey
from finetune.data.cache import LatentCache
from finetune.data.crops import Crop, make_crops
from finetune.data.masks import Masks
from finetune.jobs.dataset import cache_options, encoding_dtype
from finetune.jobs.prepare import Prepared
from finetune.objectives.base import Objective
from finetune.objectives.densities import Uniform
from finetune.objectives.loss import per_sample
from finetune.objectives.registry import build_objective
from finetune.runs.timesteps import TimestepLoss, read_timestep_loss, write_timestep_loss
from finetune.sampling.draw import as_drawn
from finetune.verdicts.due import SHARE, TRAINED

BINS = 10
IMAGES = 8  # in each bin, at most; fewer photos are taken again, with other noise
TITLE = "Timesteps"


@dataclass(frozen=True)
class Probe:
    """One image of the measurement: latents [C, h, w], conditions [1, ...], mask [1, h, w], and its noise's key."""

    latents: Tensor
    cond: dict[str, Tensor]
    mask: Tensor
    geometry: Geometry
    key: SampleKey


def images_measured(job: Prepared) -> int:
    """The number of images in each bin: as many as a twentieth of the run's time pays for, like verdicts, up to
    `IMAGES`. 0 for bases with further input channels, and for runs that are too short to learn anything."""
    run, streams = job.recipe.run, 1 if job.recipe.prior.class_images is None else 2
    predictions = SHARE * TRAINED * run.steps * run.batch_size * streams
    affordable = int(predictions / (2 * BINS))  # before and after
    return min(IMAGES, affordable) if job.family.inputs is None and run.steps >= BINS else 0


def measure_base(job: Prepared, run: Path) -> None:
    """Writes the losses of the base to the run folder. Call it before the method is attached."""
    count = images_measured(job)
    losses = losses_by_timestep(job, count) if count else []
    if losses and all(map(math.isfinite, losses)):
        write_timestep_loss(run, TimestepLoss(images=count, base=losses))


def measure_trained(job: Prepared, run: Path) -> None:
    """Adds the losses of `job.family`, the trained model, to those of the base. Without those it does nothing."""
    measured = read_timestep_loss(run) if images_measured(job) else None
    losses = losses_by_timestep(job, measured.images) if measured is not None else []
    if measured is not None and all(map(math.isfinite, losses)):
        write_timestep_loss(run, measured.model_copy(update={"trained": losses}))


@torch.no_grad()
def losses_by_timestep(job: Prepared, images: int = IMAGES) -> list[float]:
    """Returns the mean loss on the photos in each of `BINS` equal parts of the noise levels, from the image to noise.

    `images`: how many are measured, which are spread evenly within each part.
    It is the recipe's loss of what the base predicts, without the weights of timesteps. Equal jobs get equal photos,
    captions, noise and timesteps.
    """
    family, size = job.family, job.recipe.sample.batch_size
    family.parts.restore()
    probes = _probes(job, images)
    family.parts.place(["denoiser"])
    sums = torch.zeros(BINS)
    with as_drawn(family), phase(TITLE, len(probes), "images") as advance:
        for probe in probes:
            place = (probe.key.sample + 0.5) / images  # each image has its own place in the bins
            parts = [torch.arange(at, min(at + size, BINS)) for at in range(0, BINS, size)]
            found = [_losses(job, probe, bins + place) for bins in parts]
            sums += torch.cat(found).cpu()
            advance(1, "")
    mean: list[float] = (sums / len(probes)).tolist()
    return mean


def _probes(job: Prepared, images: int) -> list[Probe]:
    """The photos with their first captions, cropped at the centre; in turn, if there are fewer than `images`."""
    family, seed = job.family, job.recipe.run.seed
    crops = [
        make_crops(photo, size, "center", 1, False, seed)[0]
        for photo, size in list(zip(job.photos, job.sizes, strict=True))[:images]
    ]
    masks = Masks(job.masks, family.codec.factor, job.recipe.data.mask_floor).fill(crops)
    encoded = _encoded(job, crops)
    family.parts.place(family.text_encoders)
    with as_drawn(family):
        texts = [family.encode_prompts([captions[0]]) for captions in job.captions[: len(crops)]]
    made = [
        Probe(latents, text | image, masks.mask(crop).to(family.device), crop.geometry, SampleKey(seed, 0, 0))
        for crop, (latents, image), text in zip(crops, encoded, texts, strict=True)
    ]
    return [replace(made[index % len(made)], key=SampleKey(seed, 0, index)) for index in range(images)]


def _encoded(job: Prepared, crops: Sequence[Crop]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Each photo's latents (the mean of their distribution) and its conditions; encoded once for all of the job."""
    device, family = job.family.device, job.family
    cache = LatentCache(cache_dir(), job.base_hash, encoding_dtype(family), cache_options(job))
    cache.fill(job.family, crops)
    return [
        (
            cache.latents(crop).mean.to(device),
            {name: value[None].to(device) for name, value in cache.conditions(crop).items()},
        )
        for crop in crops
    ]


def _losses(job: Prepared, probe: Probe, bins: Tensor) -> Tensor:
    """The losses [len(bins)] of one image, at these places in the bins: 2.5 is the middle of the third."""
    family, count = job.family, len(bins)
    objective = _objective(job)
    x0 = probe.latents.expand(count, -1, -1, -1)
    noise = objective.noises([probe.key], probe.latents.shape)[0].to(x0.device).expand_as(x0)
    t = objective.timesteps(bins / BINS * family.timestep_fraction).to(x0.device)
    cond = {name: value.expand(count, *value.shape[1:]) for name, value in probe.cond.items()}
    output = family.predict(objective.add_noise(x0, noise, t), t, cond, [probe.geometry] * count)
    error = objective.error(output.float(), objective.target(x0, noise, t))
    return per_sample(error, probe.mask.expand(count, -1, -1, -1))


def _objective(job: Prepared) -> Objective:
    """The recipe's, with every noise level as likely as the others, and the noise without an offset."""
    even = {"density": Uniform(), "shift": 1.0, "noise_offset": 0.0, "input_perturbation": 0.0}
    settings = job.recipe.objective.model_copy(update=even)
    return build_objective(settings, job.family.schedule).to(job.family.device)
