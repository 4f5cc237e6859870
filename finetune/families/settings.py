"""The `base:` section of a recipe."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator, model_validator

from finetune.core.settings import Settings

if TYPE_CHECKING:
    import torch

    from finetune.families.base import Family


class Base(Settings):
    """`source`: "tiny", a diffusers folder, a hub id (`revision` pins one) or a single-file checkpoint (.safetensors).

    A file has weights only: configs and tokenizers come from `like`, a folder or hub id of the same kind. `without`
    leaves parts out that the family can do without (text_encoder_3, the T5 of SD3). `inputs` lets a plain base read a
    mask and what it leaves, a depth map, or the picture before an edit.
    """

    source: str = "tiny"
    revision: str | None = None
    like: str | None = None
    without: list[str] = []
    inputs: Literal["inpaint", "depth", "edit"] | None = None

    def load(self, dtype: torch.dtype | None = None) -> Family:
        """The family, frozen; in float32 where no dtype is asked for.

        Raises:
            BadInput: as `families.load`.
        """
        import torch

        from finetune.families.source import load_family

        family = load_family(self.source, self.revision, dtype or torch.float32, self.like, self.without)
        if self.inputs is not None:
            family.widen(self.inputs)
        return family

    @field_validator("source", "like")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        """As photos are: a run is looked at from other folders too."""
        path = os.path.expanduser(value or "")
        return os.path.abspath(path) if value != "tiny" and os.path.exists(path) else value

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value
