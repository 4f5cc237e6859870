"""A recipe: a YAML file -> one strict `Recipe`. A setting lives in the module that reads it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune.core.settings import Settings


class ExportTo(Settings):
    """`formats`: empty for all that can hold what was trained. `metadata`: "minimal" is what readers need;
    "standard" adds trigger, date, base hash, steps and seed; "full" also the recipe (with its paths) and the captions.

    What is no LoRA leaves as one by singular values: `rank` is its rank (None: the smallest that meets `max_error`, at
    most 128), `max_error` the largest |LoRA - change| / |change| over all modules that is no failure.
    """

    formats: list[str] = []
    rank: int | None = Field(None, ge=1)
    max_error: float = Field(0.2, gt=0, le=1)
    metadata: Literal["minimal", "standard", "full"] = "standard"
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
