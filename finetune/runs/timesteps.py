"""RUN/timestep_loss.json: the loss in each part of the noise levels, of the base and of what was trained."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from finetune.core.errors import BadInput
from finetune.core.files import write_json
from finetune.core.reading import read_json
from finetune.core.records import check_schema
from finetune.runs.plan import Record

NAME = "timestep_loss.json"
SCHEMA = 1
LARGEST = 1e30


class TimestepLoss(Record):
    """Mean losses in equal parts of the noise levels, from the image (first) to pure noise (last).

    Both are of the same images, noise and timesteps, `images` in each part. `trained` is empty until training ended.
    """

    images: int = Field(ge=1)
    base: list[float] = Field(min_length=1, max_length=100)
    trained: list[float] = Field(default=[], max_length=100)


def write_timestep_loss(run: Path, measured: TimestepLoss) -> None:
    """Writes what was measured to the run folder, in place of what was there."""
    write_json(run / NAME, {"schema": SCHEMA, **measured.model_dump(mode="json")})


def read_timestep_loss(run: Path) -> TimestepLoss | None:
    """Returns what a run measured, or None: a run of an older version has no such file.

    Raises:
        BadInput: the file is damaged, or a later version wrote it.
    """
    file = run / NAME
    if not file.is_file():
        return None
    values = read_json(file, dict)
    check_schema(values.get("schema"), file, SCHEMA)
    try:
        found = TimestepLoss.model_validate({key: value for key, value in values.items() if key != "schema"})
    except ValidationError as error:
        raise _damaged(file, error.errors(include_url=False)[0]["msg"]) from error
    every = [*found.base, *found.trained]
    if (found.trained and len(found.trained) != len(found.base)) or not all(0 <= value < LARGEST for value in every):
        raise _damaged(file, "its losses are not those of two models")
    return found


def _damaged(file: Path, fault: str) -> BadInput:
    return BadInput(f"{file} is damaged ({fault}): remove it, the page then leaves it out")
