"""Prompts to images, seeded: each image has a generator of its own."""

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
    """One image for each (prompt, seed) pair, drawn in batches with the family's own modules; bases that draw from
    images start from `condition`. `advance` is called after each batch with its number of images.

    The starting noise depends on the image's seed alone and is drawn on the CPU. An image's neighbours and its
    place in the batch change nothing; the size of the batch changes the last bits of the denoiser's arithmetic
    (64-pixel base, 20 steps, batches of 1, 3 and 8: one grey level in at most 6 of 100,000 values). The VAE decodes
    one image at a time: memory for it does not grow with the batch, and nor do its last bits change.
    """
    check_sampling(family, sampling)
    side = sampling.size or family.resolution
    pipeline = family.drawing.pipeline(sampling.sampler)  # brings released parts back
    if family.codec.parts:
        pipeline.vae = fitting(pipeline.vae, family.dtype, family.autocast is not None)
    images: list[Image.Image] = []
    with _in_eval(family), _as_trained(family), _hooks_removed(pipeline):
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


def _as_trained(family: Family) -> AbstractContextManager[object]:
    """fp32 weights that train under autocast are drawn with under it too."""
    return nullcontext() if family.autocast is None else torch.autocast(family.device.type, family.autocast)


@contextmanager
def _hooks_removed(pipeline: Any) -> Iterator[None]:
    """Where memory is scarce, hooks move the parts to the device and back: they must not meet the training step."""
    try:
        yield
    finally:
        if getattr(pipeline, "_all_hooks", None):
            pipeline.remove_all_hooks()


@contextmanager
def _in_eval(family: Family) -> Iterator[None]:
    """Every module in eval mode; afterwards, and after an error too, each in the mode that it was in."""
    modes = {module: module.training for part in family.parts.values() for module in part.modules()}
    for part in family.parts.values():
        part.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
