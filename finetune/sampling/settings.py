"""The `sample:` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune.core.settings import Settings

Sampler = Literal["dpm++", "ddim", "euler", "unipc"]  # finetune.families.samplers makes them


class Sample(Settings):
    """Pictures: previews during the run (`every` steps, 0 for none) and the before/after grid of the page."""

    prompts: list[str] = [
        "a photo of {token} {noun}",
        "a photo of {token} {noun} on the beach",
        "a photo of {token} {noun} in the snow",
        "a photo of a {noun}",
    ]
    negative: str = ""
    every: int = Field(default=0, ge=0)
    count: int = Field(default=4, ge=1)
    seed: int = 0
    sampler: Sampler = "dpm++"
    steps: int = Field(default=25, ge=1)
    batch_size: int = Field(default=8, ge=1)  # pictures at once
    guidance: float = 5.0
    image_guidance: float = Field(default=1.5, ge=1)  # how closely an edit keeps to its picture
