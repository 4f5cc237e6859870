"""RUN/metrics.jsonl: one line for each step, written from training events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from finetune.core.events import Event, Restored, StepDone
from finetune.core.files import append_line, write_text
from finetune.core.reading import json_lines, numbers_in

DRAWN = {"step", "loss", "lr", "seconds"}
LARGEST = 1e30  # the largest value to plot; NaN fails the comparison too
MOST = 1_000_000_000  # bytes: ten million steps


class MetricsFile:
    """A consumer of events that appends a line for each step. When a run resumes, it removes later lines."""

    def __init__(self, run: Path) -> None:
        self.file = run / "metrics.jsonl"

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._append(event)
        elif isinstance(event, Restored):
            self._rewind(event.step)

    def _append(self, done: StepDone) -> None:
        values = {"step": done.step, "loss": done.loss, "lr": done.lr, "grad_norm": done.grad_norm}
        append_line(self.file, json.dumps(values | {"seconds": round(done.seconds, 4)}))

    def _rewind(self, step: int) -> None:
        """Removes the lines after `step`: the resumed run writes them again."""
        if not self.file.is_file():
            return
        kept = [line for line, row in _rows(self.file) if row["step"] <= step]
        write_text(self.file, "".join(line + "\n" for line in kept))


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Returns the rows that can be plotted, in order: step, loss, lr and seconds are finite numbers.

    Other lines are skipped, such as one that was cut off when the process was killed.

    Raises:
        BadInput: the file is too large, or not a regular file.
    """
    return [row for _, row in _rows(file) if row.keys() >= DRAWN and all(abs(row[key]) < LARGEST for key in DRAWN)]


def _rows(file: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Gives each line of a metrics file that holds a step, with its numbers. Skips incomplete lines."""
    for line, held in json_lines(file, MOST):
        row = numbers_in(held)
        if "step" in row:
            yield line, row
