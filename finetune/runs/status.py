"""RUN/status.json: what a run is doing now, for other programs such as a web page, a script or a second terminal."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from finetune.core.events import (
    Event,
    Judged,
    Measured,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    Restored,
    RunEnded,
    StepDone,
)
from finetune.core.files import write_json
from finetune.core.progress import Pace

EVERY = 1.0  # seconds between writes: a step can be shorter than a write
SCHEMA = 1


@dataclass
class Status:
    """The content of status.json.

    `state` is "running", "finished", "stopped" or "failed". `done` of `total` units of `phase` are done; `eta` is the
    estimated time left in the phase, in seconds. `step` is the last logged step, or that of the checkpoint
    from which the run continued; `loss` is of the last logged step; `steps` is the number of steps of the run.
    `verdict` is the word for what was last measured, such as "good", and `measures` the numbers behind it.
    """

    state: str = "running"
    phase: str = ""
    done: int = 0
    total: int = 0
    eta: float | None = None
    step: int = 0
    steps: int = 0
    loss: float | None = None
    verdict: str = ""
    measures: dict[str, float] = field(default_factory=dict)


class StatusFile:
    """A consumer of events that keeps RUN/status.json up to date. Writes are atomic: a reader never sees a part."""

    def __init__(self, run: Path, steps: int) -> None:
        self.file, self.status = run / "status.json", Status(steps=steps)
        self._written = 0.0
        self._open: list[tuple[str, Pace]] = []  # phases, the outermost first: previews are drawn within the training

    def __call__(self, event: Event) -> None:
        status = self.status
        if isinstance(event, PhaseStarted):
            self._open.append((event.title, Pace(event.total)))
            self._show(*self._open[-1])
        elif isinstance(event, PhaseAdvanced):
            self._advance(event)
        elif isinstance(event, PhaseEnded):
            self._end(event.title)
        elif isinstance(event, StepDone):
            status.step, status.loss = event.step, event.loss
        elif isinstance(event, Measured | Judged):
            status.verdict, status.measures = event.verdict, {key: round(v, 4) for key, v in event.values.items()}
        elif isinstance(event, Restored):
            status.step = event.step
        elif isinstance(event, RunEnded):
            status.state = event.outcome
            status.step = status.steps if event.outcome == "finished" else status.step
        if isinstance(event, PhaseStarted | PhaseEnded | RunEnded) or time.monotonic() - self._written > EVERY:
            self.write()

    def _advance(self, event: PhaseAdvanced) -> None:
        pace = next((pace for title, pace in reversed(self._open) if title == event.title), None)
        if pace is not None:
            pace.advance(event.amount)
            self._show(*self._open[-1])

    def _end(self, title: str) -> None:
        """The phase around the one that ended is shown again; the last one stays."""
        at = next((at for at in reversed(range(len(self._open))) if self._open[at][0] == title), None)
        if at is not None:
            del self._open[at:]
        if self._open:
            self._show(*self._open[-1])

    def _show(self, title: str, pace: Pace) -> None:
        status, left = self.status, pace.left
        status.phase, status.done, status.total = title, pace.done, pace.total
        status.eta = None if left is None else round(left, 1)

    def write(self) -> None:
        """Writes the file now."""
        self._written = time.monotonic()
        if not self.file.parent.is_dir():
            return  # a run whose folder was removed: a new one with nothing but a status would stand in the way
        process = {"process": os.getpid(), "host": platform.node(), "time": round(time.time(), 1)}
        write_json(self.file, {"schema": SCHEMA, **asdict(self.status), **process})
