"""Strict settings: the base class of every recipe section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, PlainSerializer

# stands in files with "/" on every system
AnyPath = Annotated[Path, PlainSerializer(lambda path: path.as_posix(), return_type=str, when_used="json-unless-none")]


class Settings(BaseModel):
    """A section of a recipe: typed, frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
