"""RUN/run.json: facts about a run, collected before training, with a schema number."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.core.errors import BadInput
from finetune.core.files import public_name, write_json
from finetune.core.reading import BadText, read_json
from finetune.core.records import Values, migrated
from finetune.data.captions import with_trigger, without_trigger
from finetune.data.trained_words import trained_words
from finetune.runs.plan import Plan, PlanRows, Record, shared_rows

SCHEMA = 1


class RecordedSubject(Record):
    """One of several subjects. `photos` is its number of photos, `style` the words that call it if it is a style.

    `listed`: how many of its photos are in `RunRecord.photos`; None: all.
    """

    token: str
    class_noun: str | None
    photos: int
    style: str = ""
    listed: int | None = None


class RunRecord(Record):
    """The content of run.json.

    `plan` holds the rows that were printed. `planned` is the plan as a record, or None in an older file. `captions`
    holds the captions of each photo, in the order of `photos` (paths). Of more than 1,000 photos both have the first
    ones of each subject alone; then `photo_count` is the number of all, `content` the SHA-256 over all of them and
    their captions, and `tags` how many photos have each of the most frequent parts of captions. `subjects` is empty
    for a single subject; `token`, `class_noun` and `style` belong to the first. `resolution` is in pixels. `style`
    holds the words that call a style, such as "in zwx style"; it is empty for other subjects. `reads` is what the base
    must be given besides a prompt: "image", "mask", "depth". `started`: when the run began, in seconds since 1970.
    """

    token: str = ""
    class_noun: str | None = None
    style: str = ""
    family: str = ""
    base: str = ""
    base_hash: str = ""
    resolution: int | None = None
    plan: PlanRows = {}
    planned: Plan | None = None
    captions: list[list[str]] = []
    captions_from_files: int = 0
    photos: list[str] = []
    photo_count: int | None = None
    content: str = ""
    tags: dict[str, int] = {}
    subjects: list[RecordedSubject] = []
    prompts: list[str] = []
    guidance: float = 5.0
    image_guidance: float = 1.5
    reads: list[str] = []
    versions: dict[str, str] = {}
    started: float | None = None

    @property
    def names(self) -> list[str]:
        """The words for each subject in a prompt, as its captions have them: "zwx mug", "<zwx>", or "in zwx style"."""
        called: list[RunRecord | RecordedSubject] = [*self.subjects] or [self]
        return [
            each.style.lstrip(" ,;:") or trained_words(each.token, each.class_noun, captions)
            for each, captions in zip(called, self._captions_by_subject(), strict=True)
        ]

    def _captions_by_subject(self) -> list[list[str]]:
        """The captions of each subject's photos, as far as they are listed."""
        counts = [each.photos if each.listed is None else each.listed for each in self.subjects]
        ends = [*accumulate(counts)] or [len(self.captions)]
        parts = (self.captions[start:end] for start, end in zip([0, *ends], ends, strict=False))
        return [[text for texts in part for text in texts] for part in parts]

    @property
    def count(self) -> int:
        """The number of photos of all subjects."""
        return len(self.photos) if self.photo_count is None else self.photo_count

    @property
    def is_style(self) -> bool:
        """Whether the run learns styles, and no things."""
        return bool(self.style)

    def example(self, name: str) -> str:
        """Returns a prompt with one of `names`."""
        return with_trigger("a house", name) if self.is_style else f"a photo of {name} in the city"

    def pairs(self) -> list[tuple[int, int]]:
        """Returns the numbers of the prompts with a style that are there without it too: (with, without)."""
        plain = {prompt: number for number, prompt in enumerate(self.prompts)}
        styles = [name for name in self.names if self.is_style]
        found = [
            (number, plain.get(without_trigger(prompt, name) or ""))
            for number, prompt in enumerate(self.prompts)
            for name in styles
        ]
        return [(number, other) for number, other in found if other is not None]

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
