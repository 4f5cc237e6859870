"""A recipe: a YAML file -> one strict `Recipe`. A setting lives in the module that reads it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from finetune.errors import BadInput
from finetune.methods import MethodSettings
from finetune.objectives import Objective
from finetune.optim import Optim
from finetune.settings import Settings


class Base(Settings):
    """`source`: "tiny", a diffusers folder, or a hub id (`revision` pins one)."""

    source: str = "tiny"
    revision: str | None = None


class Data(Settings):
    """The subject's photos and how they are captioned, cropped and augmented.

    `captions: auto` uses a .txt file beside a photo (or metadata.jsonl / captions.csv in the folder) where one
    exists and `templates` elsewhere; `files` demands one for every photo; `templates` ignores them.
    Templates and caption files may contain {token} and {noun}.
    """

    photos: Path
    class_noun: str | None = None
    token: str = "auto"
    captions: Literal["auto", "files", "templates"] = "auto"
    templates: list[str] = ["a photo of {token} {noun}"]
    resolution: int | None = None  # None: the base's own
    crop: Literal["center", "random"] = "center"
    crops: int = Field(4, ge=1)  # how many random crops of each photo are cached
    flip: bool = False
    caption_dropout: float = Field(0.0, ge=0, le=1)


class NoPrior(Settings):
    """No prior preservation."""

    kind: Literal["none"] = "none"


class ClassImages(Settings):
    """Prior preservation with class images (arXiv:2208.12242 eq. 2), drawn once by the frozen base.

    `folder`: None keeps the set in the cache, named by what it was made of. A folder of the user's own pictures
    (without a manifest) is used as it is. `caption_dropout` empties class captions, so that the empty prompt does
    not learn the subject and guidance keeps the class as it was.
    """

    kind: Literal["class_images"] = "class_images"
    weight: float = Field(1.0, ge=0)
    count: int = Field(100, ge=1)
    prompt: str = "a photo of a {noun}"
    negative: str = ""
    folder: Path | None = None
    sampler: str = "dpm++"
    steps: int = Field(20, ge=1)
    guidance: float = 4.0
    batch_size: int = Field(8, ge=1)
    caption_dropout: float = Field(0.25, ge=0, le=1)
    flip: bool = True


Prior = Annotated[NoPrior | ClassImages, Field(discriminator="kind")]


class Run(Settings):
    """The run itself.

    `batch_size` is what one optimiser step sees: so many subject photos, and as many class images beside them.
    It is split over `accumulate` micro-batches and over the processes, so that the result does not depend on
    how many there are.
    """

    dir: Path | None = None  # None: runs/<name>-<n>
    name: str = "run"
    seed: int = 0
    steps: int = Field(800, ge=1)
    batch_size: int = Field(1, ge=1)
    accumulate: int = Field(1, ge=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    ema: float | None = Field(None, gt=0, lt=1)
    checkpoint_every: int = Field(250, ge=1)
    keep: int = Field(2, ge=1)
    log_every: int = Field(1, ge=1)
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []


class Sample(Settings):
    """Pictures: previews during the run (`every` steps, 0 for none) and the before/after grid of the page."""

    prompts: list[str] = [
        "a photo of {token} {noun}",
        "a photo of {token} {noun} on the beach",
        "a photo of {token} {noun} in the snow",
        "a photo of a {noun}",
    ]
    negative: str = ""
    every: int = Field(0, ge=0)
    count: int = Field(4, ge=1)
    seed: int = 0
    sampler: str = "dpm++"
    steps: int = Field(25, ge=1)
    guidance: float = 5.0


class ExportTo(Settings):
    formats: list[str] = ["kohya", "diffusers", "peft"]
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"


class Recipe(Settings):
    """Everything a run depends on. `RUN/recipe.yaml` holds it resolved."""

    base: Base = Base()
    data: Data
    prior: Prior = NoPrior()
    method: MethodSettings
    objective: Objective = Objective()
    optim: Optim
    run: Run = Run()
    sample: Sample = Sample()
    export: ExportTo = ExportTo()
