"""Records that cross the seams between packages: typed values inside, sentences only where a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

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
