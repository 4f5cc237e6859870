"""RUN/metrics.jsonl: one line a step, written from the events of the training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from finetune.core.errors import BadInput
from finetune.core.events import Event, Restored, StepDone
from finetune.core.files import append_line, write_text
from finetune.core.reading import parse_json, read_bytes

DRAWN = {"step", "loss", "lr", "seconds"}
LARGEST = 1e30  # of what can be drawn; NaN is not below it
MOST = 1_000_000_000  # bytes: ten million steps


class MetricsFile:
    """A consumer of events: appends a line for each step; where a run goes on, later lines are dropped first."""

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
        """Drops the lines after `step`: the resumed run writes them again."""
        if not self.file.is_file():
            return
        kept = [line for line, row in _rows(self.file) if row["step"] <= step]
        write_text(self.file, "".join(line + "\n" for line in kept))


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The lines that can be drawn: finite numbers. The others are a kill's or somebody else's."""
    return [row for _, row in _rows(file) if row.keys() >= DRAWN and all(abs(row[key]) < LARGEST for key in DRAWN)]


def _rows(file: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Each line of a metrics file that is a step's, and the numbers in it; a line that a kill cut short is none."""
    for line in read_bytes(file, MOST).decode("utf-8", "replace").splitlines():
        try:
            held = parse_json(line, str(file), dict, finite=False)
        except BadInput:
            continue
        row = {key: float(value) for key, value in held.items() if type(value) in (int, float)}
        if "step" in row:
            yield line, row
