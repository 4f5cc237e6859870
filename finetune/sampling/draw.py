"""Draws images from prompts. Each image has its own seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from PIL import Image

from finetune.core.errors import BadInput
from finetune.families.base import Family
from finetune.families.drawing import ImageCondition
from finetune.families.vae import fitting
from finetune.sampling.settings import Sampling

DEFAULTS = Sampling()


LARGEST_SIDE = 8192  # pixels: more is a slip


def check_sampling(family: Family, sampling: Sampling, section: str = "") -> None:
    """`section` stands before a setting's name in messages: "sample." of a recipe's, "--" of a command's.

    Raises:
        BadInput: this base can't be drawn with that, or what comes out would be no image.
    """
    steps, side, multiple = sampling.steps, sampling.size or family.resolution, family.square_multiple
    if steps > family.schedule.steps:
        raise BadInput(
            f"{section}steps is {steps:,} but the base's schedule has {family.schedule.steps:,} timesteps: choose "
            "fewer, such as 25"
        )
    if not math.isfinite(sampling.guidance):
        raise BadInput(f"{section}guidance is {sampling.guidance}: give a number, such as 5; 1 switches guidance off")
    if side % multiple or not 0 < side <= LARGEST_SIDE:
        nearest = min(max(1, round(side / multiple)), LARGEST_SIDE // multiple) * multiple
        raise BadInput(
            f"{section}size is {side:,} pixels, and {family.name} draws multiples of {multiple} up to "
            f"{LARGEST_SIDE:,}: choose {nearest}"
        )
    if sampling.sampler is not None:
        family.drawing.check_sampler(sampling.sampler)


@torch.no_grad()
def draw(
    family: Family,
    prompts: Sequence[str],
    sampling: Sampling = DEFAULTS,
    *,
    seeds: Sequence[int],
    condition: ImageCondition | None = None,
    advance: Callable[[int], None] = lambda amount: None,
) -> list[Image.Image]:
    """Draws one image for each (prompt, seed) pair, in batches, with the family's current modules.

    The initial noise depends only on the image's seed and is drawn on the CPU. The other images in a batch do not
    change an image. The batch size changes the last bits of the denoiser's arithmetic (measured on a 64-pixel base
    with 20 steps and batches of 1, 3 and 8: one grey level in at most 6 of 100,000 values). The VAE decodes one image
    at a time, so its memory and its last bits do not depend on the batch size.

    Args:
        family: the base, with its adapters if any.
        prompts: one prompt for each image.
        sampling: sampler, steps, guidance, size and batch size.
        seeds: one seed for each prompt.
        condition: what bases that read images draw from (`finetune.sampling.given` reads it from files); None: a
            neutral one, such as a grey image with all of it masked.
        advance: called after each batch with its number of images.

    Returns:
        RGB images of `sampling.size` pixels a side (default: the base's resolution), in the order of `prompts`.

    Raises:
        BadInput: this base can't be drawn with the sampler.
    """
    check_sampling(family, sampling)
    side = sampling.size or family.resolution
    pipeline = family.drawing.pipeline(sampling.sampler)  # loads released parts again
    if family.codec.parts:
        pipeline.vae = fitting(pipeline.vae, family.dtype, family.autocast is not None)
    images: list[Image.Image] = []
    with as_drawn(family), _hooks_removed(pipeline):
        for start in range(0, len(prompts), sampling.batch_size):
            chosen = slice(start, start + sampling.batch_size)
            texts = list(prompts[chosen])
            out = pipeline(
                prompt=texts,
                num_inference_steps=sampling.steps,
                **family.drawing.arguments(sampling.guidance, [sampling.negative] * len(texts)),
                **family.drawing.inputs(side, len(texts), sampling.steps, condition),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[chosen]],
            )
            images += out.images
            advance(len(texts))
    return images


@contextmanager
def as_drawn(family: Family) -> Iterator[None]:
    """Every module of the family as images are drawn with it: in eval mode, under autocast if it trained under it."""
    with _in_eval(family), _as_trained(family):
        yield


def _as_trained(family: Family) -> AbstractContextManager[object]:
    """Autocast as in training: fp32 weights that train under autocast also draw under it."""
    return nullcontext() if family.autocast is None else torch.autocast(family.device.type, family.autocast)


@contextmanager
def _hooks_removed(pipeline: Any) -> Iterator[None]:
    """Removes the hooks with which the pipeline moves parts to and from the device: they must not run in training."""
    try:
        yield
    finally:
        if getattr(pipeline, "_all_hooks", None):
            pipeline.remove_all_hooks()


@contextmanager
def _in_eval(family: Family) -> Iterator[None]:
    """Sets every module to eval mode inside the block, and restores its old mode afterwards, even after an error."""
    modes = {module: module.training for part in family.parts.values() for module in part.modules()}
    for part in family.parts.values():
        part.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
