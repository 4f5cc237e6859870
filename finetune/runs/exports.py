"""RUN/exports.json: the files that a run exported, and the results of their checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from finetune.core.errors import BadInput
from finetune.core.files import leads_out, write_json
from finetune.core.reading import read_json
from finetune.core.records import check_schema
from finetune.runs.plan import Record

NAME = "exports.json"
SCHEMA = 1  # of each entry; schema 0 had the same keys, but no number


class Checked(Record):
    """One check, as `finetune.core.records.Check` stores it."""

    name: str
    passed: bool
    message: str
    error: float | None = None


class Listed(Record):
    """One exported file. `path` is relative to the run folder; `size` is in bytes. `limits`: what the programs do that
    are known not to read all of it.

    `results` are the checks. An older file has only their lines, in `checks`.
    """

    format: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    path: str
    size: int
    read_by: list[str]
    checks: list[str] = []
    limits: list[str] = []
    results: list[Checked] | None = None


def write_exports(file: Path, listed: list[dict[str, Any]]) -> None:
    """Writes an exports.json. Each entry has the schema number, so that the file is still the list it always was."""
    write_json(file, [{"schema": SCHEMA, **item} for item in listed])


def read_exports(run: Path, listing: Path | None = None) -> list[dict[str, Any]]:
    """What a run's exports.json lists, as it stands there; nothing where there is none. `listing`: that of a
    checkpoint's exports, in RUN/exports/step-000250.

    Raises:
        BadInput: it is damaged, or names a file outside RUN/exports.
    """
    file = listing or run / NAME
    if not file.is_file():
        return []
    advice = f"remove it, then `finetune export {run}` writes it again"
    listed = read_json(file, list, advice)
    for item in listed:
        check_schema(item.get("schema", 0) if isinstance(item, dict) else 0, file, SCHEMA)
        try:
            path = Listed.model_validate(item).path
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors(include_url=False)[0]["loc"])
            raise BadInput(f"{file} is damaged ({where or item!r:.80}): {advice}") from error
        parts = Path(path).parts
        if len(parts) < 2 or parts[0] != "exports" or ".." in parts or leads_out(run / path, run):
            raise BadInput(f"{file} names {path[:80]!r}, which is not in {run / 'exports'}: {advice}")
    return listed
