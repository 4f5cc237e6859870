"""Settings for drawing images, and the `sample:` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from finetune.core.settings import AnyPath, BatchSize, Seed, Settings

Sampler = Literal["dpm++", "ddim", "euler", "unipc"]  # finetune.families.schedulers makes them


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing images.

    Attributes:
        sampler: one of `Sampler`; None: the base's own.
        guidance: the scale of classifier-free guidance (arXiv:2207.12598); 1 switches it off.
        size: the side of the square images in pixels; None: the base's own resolution.
        batch_size: the number of images drawn together. More images need more memory.
    """

    negative: str = ""
    sampler: str | None = "dpm++"
    steps: int = 25
    guidance: float = 5.0
    size: int | None = None
    batch_size: int = 8


class SampleSettings(Settings):
    """Images: previews during the run (`every` steps, 0 for none) and the before/after grid of the page."""

    prompts: list[str] = [
        "a photo of {token} {noun}",
        "a photo of {token} {noun} on the beach",
        "a photo of {token} {noun} in the snow",
        "a photo of a {noun}",
    ]
    negative: str = ""
    every: int = Field(default=0, ge=0)
    count: int = Field(default=4, ge=1, le=1_000)
    seed: Seed = 0
    sampler: Sampler = "dpm++"
    steps: int = Field(default=25, ge=1)
    batch_size: BatchSize = 8  # images drawn together
    guidance: float = 5.0
    image_guidance: float = Field(default=1.5, ge=1)  # how closely an edit follows its image
    # what bases that read images draw from; None: the first photo and what is beside it
    image: AnyPath | None = None
    mask: AnyPath | None = None
    depth: AnyPath | None = None

    @field_validator("image", "mask", "depth")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @property
    def files(self) -> dict[str, Path]:
        """The files to draw from that are named, by setting."""
        named = {"image": self.image, "mask": self.mask, "depth": self.depth}
        return {name: path for name, path in named.items() if path is not None}

    def sampling(self, size: int) -> Sampling:
        """The same settings as a `Sampling`, for square images of `size` pixels a side."""
        return Sampling(self.negative, self.sampler, self.steps, self.guidance, size, self.batch_size)
