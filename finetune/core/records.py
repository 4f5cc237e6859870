"""Typed records that packages exchange. They become text only when they are shown to the user."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from finetune import __version__
from finetune.core.errors import BadInput

PASSED, NOT_PASSED = "ok: ", "FAILED: "  # the start of a line in messages


@dataclass(frozen=True)
class Check:
    """The result of one check of a written file.

    `name` identifies the check; it does not change between versions. `message` says what was measured or what is
    wrong. `error` is the largest relative error, or None if the check did not measure one.
    """

    name: str
    passed: bool
    message: str
    error: float | None = None

    @property
    def line(self) -> str:
        """The result as one line of text."""
        return f"{PASSED if self.passed else NOT_PASSED}{self.message}"

    def values(self) -> dict[str, Any]:
        """Returns the fields for JSON. An infinite error becomes None, because JSON has no infinity."""
        finite = self.error is not None and math.isfinite(self.error)
        return asdict(self) | {"error": self.error if finite else None}

    @classmethod
    def of_older(cls, line: str) -> Self:
        """Makes a check from its line: older versions stored only lines in exports.json."""
        return cls("", not line.startswith(NOT_PASSED), line.removeprefix(PASSED).removeprefix(NOT_PASSED))


def checks_of(item: Mapping[str, Any]) -> list[Check]:
    """Returns the checks of one entry of exports.json, in the current form or the older one."""
    if "results" in item:
        return [Check(**values) for values in item["results"]]
    return [Check.of_older(line) for line in item["checks"]]


class LaterVersion(BadInput):
    """A file with a schema that only a later version knows."""


Values = dict[str, Any]


def migrated(values: Values, file: Path, schema: int, steps: Sequence[Callable[[Values], Values]]) -> Values:
    """Returns the values of a JSON file, converted to `schema`. A file without a schema number has schema 0.

    `steps` are the conversions: from schema 0 to 1, from 1 to 2, and so on up to `schema`.

    Raises:
        LaterVersion: a later version wrote the file.
    """
    found = values.get("schema", 0)
    check_schema(found, file, schema)
    for step in steps[found:]:
        values = step(values)
    return values | {"schema": schema}


def check_schema(found: Any, file: Path, schema: int) -> None:
    """Refuses a file whose schema number `found` is not one that this version knows, so that it is not misread.

    Raises:
        LaterVersion: `found` is not a number from 0 to `schema`.
    """
    if isinstance(found, int) and 0 <= found <= schema:
        return
    raise LaterVersion(
        f"{file} has schema {str(found)[:20]}, and finetune {__version__} reads schemas up to {schema}: install the "
        "version that wrote it, or a later one"
    )
