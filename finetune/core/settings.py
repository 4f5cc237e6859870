"""Strict settings: the base class of every recipe section."""

from __future__ import annotations

from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer


def _no_path(value: Any) -> Any:
    if value == "" or "\0" in str(value):
        raise ValueError("no file or folder can have that name: give a path")
    return value


Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what torch takes
BatchSize = Annotated[int, Field(ge=1, le=65_536)]  # more is a slip
# written to files with "/" on every system
AnyPath = Annotated[
    Path,
    BeforeValidator(_no_path),
    PlainSerializer(lambda path: path.as_posix(), return_type=str, when_used="json-unless-none"),
]


class Settings(BaseModel):
    """A section of a recipe: typed and read-only. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def chosen_by_kind(*options: Any) -> Any:
    """Returns the type of a field that holds settings of one of these classes.

    The key `kind` chooses the class. A plain text is read as a `kind` with every other setting at its default.
    """
    union: Any = Annotated[reduce(or_, options), Field(discriminator="kind")]
    names: Any = Literal[tuple(option.model_fields["kind"].default for option in options)]
    return Annotated[union, BeforeValidator(_named, json_schema_input_type=names | union)]


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value
