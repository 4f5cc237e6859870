"""RUN/run.json: facts about a run, collected before training, with a schema number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.core.errors import BadInput
from finetune.core.files import public_name, write_json
from finetune.core.reading import BadText, read_json
from finetune.core.records import Values, migrated
from finetune.runs.plan import Plan, PlanRows, Record, shared_rows

SCHEMA = 1


class RecordedSubject(Record):
    """One of several subjects. `photos` is its number of photos."""

    token: str
    class_noun: str | None
    photos: int


class RunRecord(Record):
    """The content of run.json.

    `plan` holds the rows that were printed. `planned` is the plan as a record, or None in an older file. `captions`
    holds the captions of each photo, in the order of `photos` (paths). `subjects` is empty for a single subject;
    `token` and `class_noun` belong to the first. `resolution` is in pixels. `started`: when the run began, in seconds
    since 1970.
    """

    token: str = ""
    class_noun: str | None = None
    family: str = ""
    base: str = ""
    base_hash: str = ""
    resolution: int | None = None
    plan: PlanRows = {}
    planned: Plan | None = None
    captions: list[list[str]] = []
    captions_from_files: int = 0
    photos: list[str] = []
    subjects: list[RecordedSubject] = []
    prompts: list[str] = []
    guidance: float = 5.0
    versions: dict[str, str] = {}
    started: float | None = None

    @property
    def names(self) -> list[str]:
        """The words for each subject in a prompt, such as "zwx mug"."""
        called = [(subject.token, subject.class_noun) for subject in self.subjects]
        return [" ".join(text for text in pair if text) for pair in called or [(self.token, self.class_noun)]]

    @property
    def trigger(self) -> str:
        """The words for all subjects in one text, such as "zwx mug, vtx dog"."""
        return ", ".join(self.names)

    @property
    def public_base(self) -> str:
        """The name of the base, safe to share."""
        return public_name(self.base)

    @property
    def public_plan(self) -> PlanRows:
        """The plan's rows, safe to share."""
        return shared_rows(self.planned) if self.planned else self.plan


def read_record(file: Path) -> RunRecord:
    """Reads run.json, of this schema or an older one.

    Raises:
        BadInput: it is damaged, or a later version wrote it.
    """
    try:
        values = read_json(file, dict)
        return RunRecord.model_validate(migrated(values, file, SCHEMA, [_from_0]))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(file, f"{where}: {first['msg']}") from error
    except BadText as fault:
        raise _damaged(file, fault.reason) from fault
    except (AttributeError, TypeError) as error:
        raise _damaged(file, str(error)) from error


def write_record(file: Path, record: RunRecord) -> None:
    """Writes run.json atomically, with the current schema number."""
    write_json(file, {"schema": SCHEMA, **record.model_dump(mode="json")})


def _damaged(file: Path, fault: str) -> BadInput:
    return BadInput(f"{file} is damaged ({fault}): restore the run's own file, or train again")


def _from_0(values: Values) -> Values:
    """Schema 0 had no number, and its plan had only rows. Two of them can be private, and are removed."""
    base = values.get("base", "")
    private = {"training prompts"} | ({"base"} if public_name(base) != base else set())
    rows: dict[str, Any] = values.get("plan", {})
    return values | {"plan": {name: row for name, row in rows.items() if name not in private}}
