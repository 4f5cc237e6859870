"""The `export:` section of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from finetune.core.settings import Settings

Verify = Literal["full", "deltas", "off"]

UNCHECKED = "not checked"  # shown for a file without checks


class ExportTo(Settings):
    """`formats`: empty for all that can hold what was trained. `metadata`: "minimal" is what readers need;
    "standard" adds trigger, date, base hash, steps and seed; "full" also the recipe (with its paths) and the captions.

    Other methods are exported as LoRA by singular values. `rank` is its rank (None: the smallest that meets
    `max_error`, at most 128). `max_error` is the largest allowed |LoRA - change| / |change| over all modules.

    `verify`: "full" also has other programs' loaders read each file into a clean base; "deltas" reads the files again
    and compares what they hold, without a second model; "off" only writes them.
    """

    formats: list[str] = []
    rank: int | None = Field(default=None, ge=1)
    max_error: float = Field(default=0.2, gt=0, le=1)
    metadata: Literal["minimal", "standard", "full"] = "standard"
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    verify: Verify = "full"

    @field_validator("verify", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a plain `off` as false
