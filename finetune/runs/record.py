"""RUN/run.json: what a run found out before training, as a record with a schema number."""

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
    """`photos`: how many of the run's photos are its."""

    token: str
    class_noun: str | None
    photos: int


class RunRecord(Record):
    """`plan`: the rows that were printed. `planned`: the plan in values; None in an older file. `captions`: of each
    photo, in the order of `photos`. `subjects`: where there are several; `token` and `class_noun` are the first's."""

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

    @property
    def names(self) -> list[str]:
        """What calls each subject in a prompt."""
        called = [(subject.token, subject.class_noun) for subject in self.subjects]
        return [" ".join(text for text in pair if text) for pair in called or [(self.token, self.class_noun)]]

    @property
    def trigger(self) -> str:
        """ "zwx mug"; of several "zwx mug, vtx dog"."""
        return ", ".join(self.names)

    @property
    def public_base(self) -> str:
        """The base as a page may tell it."""
        return public_name(self.base)

    @property
    def public_plan(self) -> PlanRows:
        """The plan's rows as a page may tell them."""
        return shared_rows(self.planned) if self.planned else self.plan


def read_record(file: Path) -> RunRecord:
    """Raises:
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
    write_json(file, {"schema": SCHEMA, **record.model_dump(mode="json")})


def _damaged(file: Path, fault: str) -> BadInput:
    return BadInput(f"{file} is not what a run writes ({fault}): give the run's own file back, or train again")


def _from_0(values: Values) -> Values:
    """Before there was a number: the plan was rows alone, of which two may be private."""
    base = values.get("base", "")
    private = {"training prompts"} | ({"base"} if public_name(base) != base else set())
    rows: dict[str, Any] = values.get("plan", {})
    return values | {"plan": {name: row for name, row in rows.items() if name not in private}}
