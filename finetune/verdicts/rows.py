"""RUN/verdicts.jsonl: one line for each step that was measured. What is read there is checked, as metrics are."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune.core.events import Event, Measured, Restored
from finetune.core.files import append_line, write_text
from finetune.core.reading import json_lines, numbers_in

FILE = "verdicts.jsonl"
LARGEST = 1e12  # the largest value to plot; NaN fails the comparison too
MOST = 100_000_000  # bytes
BROKEN = 1e6  # a measure from here on says that the model is destroyed
WORST = 1e9  # stands for what is no number, or is too large to be written


@dataclass(frozen=True)
class Row:
    """The measures after `step`, by name; `seconds` is what it took to measure them."""

    step: int
    values: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def writable(values: Mapping[str, float]) -> dict[str, float]:
    """Measures as they are written, so that those in memory and those read back are the same numbers."""
    bounded = {name: WORST if math.isnan(v) else max(-WORST, min(WORST, v)) for name, v in values.items()}
    return {name: round(value, 6) for name, value in bounded.items()}


class VerdictsFile:
    """A consumer of events that appends a line for each measured step. When a run resumes, it removes later lines."""

    def __init__(self, run: Path) -> None:
        self.file = run / FILE

    def __call__(self, event: Event) -> None:
        if isinstance(event, Measured):
            self._put(Row(event.step, event.values, event.seconds))
        elif isinstance(event, Restored):
            self._rewind(event.step)

    def _put(self, row: Row) -> None:
        """A step that is measured again, as the first one is at every start, keeps its first line."""
        if row.step not in {old.step for old in read_rows(self.file)}:
            append_line(self.file, _line(row).rstrip("\n"))

    def _rewind(self, step: int) -> None:
        if self.file.is_file():
            kept = [line for line, row in _lines(self.file) if row.step <= step]
            write_text(self.file, "".join(line + "\n" for line in kept))


def read_rows(file: Path) -> list[Row]:
    """The rows in the order of their steps; none without a file. Lines that no run writes are skipped, such as one
    that was cut off when the process was killed.

    Raises:
        BadInput: the file is too large, or not a regular file.
    """
    rows = {row.step: row for _, row in _lines(file)} if file.exists() else {}
    return [rows[step] for step in sorted(rows)]


def with_images(file: Path, values: Mapping[str, float | None]) -> list[Row]:
    """The rows with what the images after the run say added to the last one, which is written. None: they say nothing
    of it, and what was there before goes."""
    *rows, last = read_rows(file)
    said = writable({name: value for name, value in values.items() if value is not None})
    held = {name: value for name, value in last.values.items() if name not in values} | said
    rows.append(replace(last, values=held))
    if held != last.values:
        write_text(file, "".join(_line(row) for row in rows))
    return rows


def up_to(rows: Sequence[Row], step: int | None) -> list[Row]:
    """The rows up to a step; None: all."""
    return [row for row in rows if step is None or row.step <= step]


def _line(row: Row) -> str:
    return json.dumps({"step": row.step, **writable(row.values), "seconds": round(row.seconds, 3)}) + "\n"


def _lines(file: Path) -> Iterator[tuple[str, Row]]:
    for line, held in json_lines(file, MOST):
        values = numbers_in(held)
        step, seconds = values.pop("step", -1.0), values.pop("seconds", 0.0)
        if len(values) + 2 == len(held) and step >= 0 and step == int(step) and _sound([seconds, *values.values()]):
            yield line, Row(int(step), values, seconds)


def _sound(values: Sequence[float]) -> bool:
    return all(abs(value) < LARGEST for value in values)
