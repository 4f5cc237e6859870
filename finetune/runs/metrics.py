"""RUN/metrics.jsonl: one line a step, written from the events of the training."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.core.events import Event, Restored, StepDone
from finetune.core.files import write_text


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
        with self.file.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(values | {"seconds": round(done.seconds, 4)}) + "\n")

    def _rewind(self, step: int) -> None:
        """Drops the lines after `step`: the resumed run writes them again."""
        if not self.file.is_file():
            return
        kept = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):  # the line that a kill cut short
                continue
        write_text(self.file, "".join(line + "\n" for line in kept))
