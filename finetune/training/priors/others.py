"""A prior of everything else: images of diverse prompts, which every kind of prior can have beside its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.core.settings import AnyPath, BatchSize, Settings
from finetune.sampling.settings import Sampler

if TYPE_CHECKING:
    from finetune.training.priors.class_images import ClassImages

ComparedWith = Literal["images", "base"]  # what a sample is compared with: its image, or the frozen base's prediction
FORWARD = 1 / 3  # of the time of a training pass: a backward pass takes about twice the time of a forward pass


class Others(Settings):
    """A further stream of images that the base drew for diverse prompts and for the empty prompt.

    A few photos of one subject also change what the base draws for prompts that have nothing to do with it. This
    stream keeps that. Its images do not depend on the subject: they are drawn once for a base and a resolution, and
    every run uses them.

    `weight` multiplies their loss. `empty` is the share of images for the empty prompt. `prompts` is a list, or a text
    file with one prompt a line; None: the base's own list, else the one that is included. `share` is the number of
    these samples in a step, relative to `run.batch_size`. With `target: images` they are trained as photos are; with
    `target: base` the trained model must keep the frozen base's prediction for them.
    """

    count: int = Field(default=256, ge=1, le=100_000)
    weight: float = Field(default=1.0, gt=0)
    empty: float = Field(default=0.15, ge=0, le=1)
    prompts: AnyPath | tuple[str, ...] | None = None
    share: float = Field(default=1.0, gt=0, le=1)
    target: ComparedWith = "images"
    sampler: Sampler = "dpm++"
    steps: int = Field(default=20, ge=1)
    guidance: float = 4.0
    batch_size: BatchSize = 8

    @property
    def drawn_as(self) -> ClassImages:
        """The settings for drawing the images, which are drawn as class images are."""
        from finetune.training.priors.class_images import (
            ClassImages,  # which needs `PriorSettings`, and that needs this
        )

        return ClassImages(
            count=self.count,
            prompt="",
            sampler=self.sampler,
            steps=self.steps,
            guidance=self.guidance,
            batch_size=self.batch_size,
        )

    @property
    def passes(self) -> float:
        """The cost in a step for each photo, in training passes."""
        return self.share * (1 + FORWARD * (self.target == "base"))
