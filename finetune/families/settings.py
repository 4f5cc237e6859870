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

    A file has only weights: configs and tokenizers come from `like`, a folder or hub id of the same kind. `without`
    leaves out parts that the family does not need (text_encoder_3, the T5 of SD3). `inputs` extends a plain base to
    read a mask and a masked image, a depth map, or the image before an edit.
    """

    source: str = "tiny"
    revision: str | None = None
    like: str | None = None
    without: list[str] = []
    inputs: Literal["inpaint", "depth", "edit"] | None = None

    def load(self, dtype: torch.dtype | None = None) -> Family:
        """Loads the family, frozen, in `dtype` (None: float32).

        Raises:
            BadInput: as `load_family`.
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
        """Makes the path absolute, since the run may be used from other folders."""
        if value is not None and (not value.strip() or "\0" in value):
            raise ValueError("it is blank: give 'tiny', a diffusers folder or a hub id")
        path = os.path.expanduser(value or "")
        return os.path.abspath(path) if value != "tiny" and os.path.exists(path) else value

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value
