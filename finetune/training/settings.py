"""The `run:` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from finetune.core.settings import AnyPath, Settings

# what Windows keeps for devices: no file can have such a name there, whatever its ending
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}


class Run(Settings):
    """The run itself.

    `batch_size` is what one optimiser step sees: so many subject photos, and as many class images beside them.
    It is split over `accumulate` micro-batches and over the processes, so that the result does not depend on
    how many there are. `released`: frozen parts whose work is cached are dropped and read again for images, or wait
    in the CPU's memory (`cpu`: faster previews, for as much main memory as they take).
    """

    dir: AnyPath | None = None  # None: runs/<name>-<n>
    name: str = Field(default="run", pattern=r"^\w[\w .+-]*$", max_length=100)  # of files: no folders in it
    seed: int = 0
    steps: int = Field(default=800, ge=1, le=999_999)  # checkpoints are numbered by six digits
    batch_size: int = Field(default=1, ge=1)
    accumulate: int = Field(default=1, ge=1)
    processes: int | None = Field(default=None, ge=1)  # None: as many as were launched
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    deterministic: bool = False  # the same bits on CUDA too; slower there
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
        if value.split(".")[0].strip().lower() in DEVICES or value.endswith((".", " ")):
            raise ValueError(
                "no file can have that name on Windows (a device, or a dot or space at its end): change it"
            )
        return value
