"""RUN/adherence.json: how far the images of each sample prompt show what it says (`finetune.verdicts.adherence`)."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, FiniteFloat, ValidationError

from finetune.core.errors import BadInput
from finetune.core.files import write_json
from finetune.core.reading import read_json
from finetune.core.records import check_schema
from finetune.runs.plan import Record
from finetune.verdicts.adherence import PromptShown

NAME = "adherence.json"
SCHEMA = 1

Helped = list[FiniteFloat]


class Asked(Record):
    """A prompt with the fields of `PromptShown`, a value for each image."""

    prompt: str
    own: Helped = Field(max_length=1_000)
    others: Helped = Field(max_length=1_000)
    after: Helped = Field(default=[], max_length=1_000)

    @property
    def shown(self) -> PromptShown:
        return PromptShown(self.own, self.others, self.after)


class Adherence(Record):
    """`step`: of the trained model whose images were asked about; 0 before training ended."""

    step: int = Field(default=0, ge=0)
    asked: list[Asked] = Field(max_length=10_000)

    @property
    def lost(self) -> dict[str, float]:
        """Of each prompt that the base's images can tell: the share of its words that is lost."""
        found = {each.prompt: each.shown.lost for each in self.asked}
        return {prompt: round(lost, 4) for prompt, lost in found.items() if lost is not None}


def write_adherence(run: Path, found: Adherence) -> None:
    """Writes what was measured to the run folder, in place of what was there."""
    write_json(run / NAME, {"schema": SCHEMA, **found.model_dump(mode="json")})


def read_adherence(run: Path) -> Adherence | None:
    """Returns what a run measured, or None: it measured nothing, or an older version made it.

    Raises:
        BadInput: the file is damaged, or a later version wrote it.
    """
    file = run / NAME
    if not file.is_file():
        return None
    values = read_json(file, dict)
    check_schema(values.get("schema"), file, SCHEMA)
    try:
        return Adherence.model_validate({key: value for key, value in values.items() if key != "schema"})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]["msg"]
        raise BadInput(f"{file} is damaged ({fault}): remove it, the verdict then leaves it out") from error
