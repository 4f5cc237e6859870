"""The `run:` section of a recipe."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from finetune.core.settings import AnyPath, BatchSize, Seed, Settings

# names that Windows reserves for devices: no file can have one, whatever its ending
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}


class Run(Settings):
    """The `run:` section of a recipe.

    `batch_size`: the number of subject photos in one optimiser step; with class images, the same number of those is
    added. It is split over `accumulate` micro-batches and over the processes, so the result does not depend on their
    number. `released`: what happens to frozen parts whose outputs are cached: they are dropped and loaded again for
    images, or kept in the CPU's memory (`cpu`: faster previews, but more main memory).
    """

    dir: AnyPath | None = None  # None: runs/<name>-<n>
    name: str = Field(default="run", max_length=100)  # part of file names
    seed: Seed = 0
    steps: int = Field(default=800, ge=1, le=999_999)  # checkpoints are numbered by six digits
    batch_size: BatchSize = 1
    accumulate: int = Field(default=1, ge=1)
    processes: int | None = Field(default=None, ge=1)  # None: the number that was launched
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    deterministic: bool = False  # bit-identical results on CUDA too, but slower
    gradient_checkpointing: bool = False
    released: Literal["reread", "cpu"] = "reread"
    ema: float | None = Field(default=None, gt=0, lt=1)
    checkpoint_every: int = Field(default=250, ge=1)
    keep: int = Field(default=2, ge=1)
    log_every: int = Field(default=1, ge=1)
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []

    @field_validator("name")
    @classmethod
    def _fits_every_system(cls, value: str) -> str:
        if not re.fullmatch(r"\w[\w .+-]*", value):
            raise ValueError(
                "file names begin with it: write letters, digits, spaces and . + - _ only, a letter or digit first"
            )
        if value.split(".")[0].strip().lower() in DEVICES or value.endswith((".", " ")):
            raise ValueError(
                "no file can have that name on Windows (a device, or a dot or space at its end): change it"
            )
        return value
