"""The `run:` section of a recipe."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from finetune.core.settings import AnyPath, BatchSize, Seed, Settings

# names that Windows reserves for devices: no file can have one, whatever its ending
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}


class Run(Settings):
    """The `run:` section of a recipe.

    `batch_size`: the number of subject photos in one optimiser step; with class images, the same number of those is
    added. It is split over `accumulate` micro-batches and over the processes, so the result does not depend on their
    number. `verdicts`: whether the model is compared with its base while it trains (`finetune.verdicts`): as often as
    a twentieth of the run's time allows (`auto`; a short run is left out), ten times (`on`), or never (`off`);
    `verdicts_every` says after how many steps. The results are the same with and without. `keep_best`: the checkpoint
    that the verdicts recommend is kept too. `released`: what happens to frozen parts whose outputs are cached: they
    are dropped and loaded again for images, or kept in the CPU's memory (`cpu`: faster previews, but more main
    memory). `fast`: on a CPU, frozen and LoRA layers are computed by other kernels (`on`), if the base is
    large enough (`auto`), or not (`off`); on an NVIDIA GPU, LoRA's linear layers (`on`). See `finetune.training.fast`.
    `weights`: what full training holds its weights in; bf16 needs half of the memory or less, and rounds each update
    stochastically (see `finetune.training.rounding`).
    `compile`: on a GPU, run compiled blocks (`regional`) or record each step as a CUDA graph (`graphs`). `tf32`: round
    the inputs of fp32 products to TF32. `channels_last`: another order of weights and activations in memory. All of
    these change the last bits.
    """

    dir: AnyPath | None = None  # None: runs/<name>-<n>
    name: str = Field(default="run", max_length=100)  # part of file names
    seed: Seed = 0
    steps: int = Field(default=800, ge=1, le=999_999)  # checkpoints are numbered by six digits
    batch_size: BatchSize = 1
    accumulate: int = Field(default=1, ge=1)
    processes: int | None = Field(default=None, ge=1)  # None: the number that was launched
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    weights: Literal["fp32", "bf16"] = "fp32"  # of full training
    deterministic: bool = False  # bit-identical results on CUDA too, but slower
    gradient_checkpointing: bool = False
    shard: bool = False  # each of several processes holds a part of the model, its gradients and the optimiser's state
    released: Literal["reread", "cpu"] = "reread"
    fast: Literal["auto", "on", "off"] = "auto"
    compile: Literal["off", "regional", "graphs"] = "off"
    tf32: bool = False
    channels_last: bool = False
    ema: float | None = Field(default=None, gt=0, lt=1)
    checkpoint_every: int = Field(default=250, ge=1)
    keep: int = Field(default=2, ge=1)
    keep_best: bool = False
    verdicts: Literal["auto", "on", "off"] = "auto"
    verdicts_every: int | None = Field(default=None, ge=1)
    log_every: int = Field(default=1, ge=1)
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []

    @property
    def weight_bytes(self) -> int:
        """The bytes of a trained weight, and of its gradient."""
        return 2 if self.weights == "bf16" else 4

    @field_validator("verdicts", "fast", mode="before")
    @classmethod
    def _a_word_in_yaml(cls, value: Any) -> Any:
        return {False: "off", True: "on"}[value] if isinstance(value, bool) else value  # YAML reads `off` as false

    @field_validator("compile", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: Any) -> Any:
        return "off" if value is False else value

    @model_validator(mode="after")
    def _measured(self) -> Run:
        if self.verdicts == "off" and (self.keep_best or self.verdicts_every is not None):
            name = "keep_best" if self.keep_best else "verdicts_every"
            raise ValueError(f"run.{name} needs the verdicts, which run.verdicts=off leaves out: remove one of them")
        return self

    @model_validator(mode="after")
    def _same_bits(self) -> Run:
        if self.deterministic and self.compile == "regional":
            raise ValueError(
                "run.deterministic is true but run.compile is 'regional', and a resumed run may compile other code: "
                "use run.compile=off or graphs"
            )
        return self

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
