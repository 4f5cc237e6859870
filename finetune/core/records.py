"""Records that cross the seams between packages: typed values inside, sentences only where a person reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from finetune import __version__
from finetune.core.errors import BadInput

PASSED, NOT_PASSED = "ok: ", "FAILED: "  # how a line for a person begins


@dataclass(frozen=True)
class Check:
    """What one check of a written file found.

    `name`: which check it is, one word that does not change. `message`: what was measured or what is wrong, for a
    person. `error`: the largest relative error, where the check measured one.
    """

    name: str
    passed: bool
    message: str
    error: float | None = None

    @property
    def line(self) -> str:
        """For a person."""
        return f"{PASSED if self.passed else NOT_PASSED}{self.message}"

    def values(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        finite = self.error is not None and math.isfinite(self.error)
        return asdict(self) | {"error": self.error if finite else None}

    @classmethod
    def of_older(cls, line: str) -> Self:
        """From an exports.json that was written before checks were records: its lines are all that there is."""
        return cls("", not line.startswith(NOT_PASSED), line.removeprefix(PASSED).removeprefix(NOT_PASSED))


def checks_of(item: Mapping[str, Any]) -> list[Check]:
    """The checks of one file that exports.json lists, of this form or the older one."""
    if "results" in item:
        return [Check(**values) for values in item["results"]]
    return [Check.of_older(line) for line in item["checks"]]


class LaterVersion(BadInput):
    """A file of a form that this version does not know."""


Values = dict[str, Any]


def migrated(values: Values, file: Path, schema: int, steps: Sequence[Callable[[Values], Values]]) -> Values:
    """What a JSON file holds, in the form of `schema`; a file without a number is of form 0.

    `steps`: from form 0 to 1, from 1 to 2 and so on up to `schema`.

    Raises:
        BadInput: a later version wrote it.
    """
    found = values.get("schema", 0)
    check_schema(found, file, schema)
    for step in steps[found:]:
        values = step(values)
    return values | {"schema": schema}


def check_schema(found: Any, file: Path, schema: int) -> None:
    """Refuses a form that this version does not know, rather than to read it wrongly."""
    if isinstance(found, int) and 0 <= found <= schema:
        return
    raise LaterVersion(
        f"{file} has schema {str(found)[:20]}, and finetune {__version__} reads schemas up to {schema}: install the "
        "version that wrote it, or a later one"
    )
