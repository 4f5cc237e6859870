"""Progress as plain lines: for logs, notebooks, and every place without a terminal."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from finetune.core.events import Event, PhaseAdvanced, PhaseEnded, PhaseStarted, sent_to

EVERY = 30.0  # seconds between two lines of a phase
RESTORED = 1.0  # seconds: what a phase has done this soon, and all at once, was done before it began
LOGGER = logging.getLogger("finetune")


class Pace:
    """How far a phase is. `total` is its number of units, 0 if that is not known. Units that a resumed phase finds
    done are not its work."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self._skipped, self._began = total, 0, 0, time.monotonic()

    def advance(self, amount: int) -> None:
        """Counts `amount` more units."""
        if self.done == 0 and amount > 1 and self.seconds < RESTORED:
            self._skipped = amount
        self.done += amount

    @property
    def seconds(self) -> float:
        """Since the phase began."""
        return time.monotonic() - self._began

    @property
    def worked(self) -> int:
        """The units that this phase itself has done."""
        return self.done - self._skipped

    @property
    def speed(self) -> float:
        """Units per second; 0 before the first."""
        return self.worked / max(self.seconds, 1e-9)

    @property
    def left(self) -> float | None:
        """The estimated seconds until the phase ends; None before its first unit, and where no total is known."""
        return (self.total - self.done) / self.speed if self.worked > 0 and self.total else None


class ProgressLines:
    """A consumer of events that says one line when a phase begins and ends, and one every `every` seconds between.

    A phase with something to tell, such as the loss, also says its first line of that at once. The lines look like
    `        training  75 of 250 steps, loss 0.1234, 2.4 steps a second, 1:13 left`.
    """

    def __init__(self, say: Callable[[str], None], every: float = EVERY) -> None:
        self._say, self._every = say, every
        self._open: list[_Phase] = []  # the innermost last

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            self._open.append(_Phase(event))
            self._tell(self._open[-1].start)
        elif isinstance(event, PhaseAdvanced) and self._open:
            inner = self._open[-1]
            first_note = bool(event.note) and not inner.note
            inner.advance(event)
            ended = inner.pace.done >= inner.pace.total > 0
            if not ended and (first_note or time.monotonic() - inner.said >= self._every):
                self._tell(inner.progress)
        elif isinstance(event, PhaseEnded) and self._open:
            self._tell(self._open.pop().end)

    def _tell(self, text: str) -> None:
        self._say(text)
        for phase in self._open:  # what a phase inside says is a sign of life of the outer ones too
            phase.said = time.monotonic()


class _Phase:
    def __init__(self, start: PhaseStarted) -> None:
        self.title, self.unit, self.note, self.pace = start.title, start.unit, "", Pace(start.total)
        self.said = time.monotonic()

    def advance(self, event: PhaseAdvanced) -> None:
        self.pace.advance(event.amount)
        self.note = event.note or self.note

    @property
    def start(self) -> str:
        return f"{self._label}  begins" if self._single else self.standing

    @property
    def _single(self) -> bool:
        return self.pace.total == 1 and not self.unit

    @property
    def standing(self) -> str:
        return f"{self._label}  {self._count}"

    @property
    def _label(self) -> str:
        return f"{self.title.lower():>16}"

    @property
    def _count(self) -> str:
        of = f" of {self.pace.total}" if self.pace.total else ""
        count = f"{self.pace.done}{of} {self.unit}".rstrip()
        return f"{count}{f', {self.note}' if self.note else ''}"

    @property
    def progress(self) -> str:
        speed, left = self.pace.speed, self.pace.left
        unit = self.unit or "units"
        if left is None or speed <= 0:
            return self.standing
        pace = f"{speed:.1f} {unit} a second" if speed >= 1 else f"{1 / speed:.1f} s for each {unit.removesuffix('s')}"
        return f"{self.standing}, {pace}, {clock(left)} left"

    @property
    def end(self) -> str:
        ended = "done" if self.pace.done >= self.pace.total else "ended early,"
        count = "" if self._single else f"{self._count}, "
        return f"{self._label}  {count}{ended} after {clock(self.pace.seconds)}"


def clock(seconds: float) -> str:
    """Seconds as 0:05, 12:40 or 3:02:10."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes = f"{rest // 60:02d}" if hours else str(rest // 60)
    return f"{f'{hours}:' if hours else ''}{minutes}:{rest % 60:02d}"


def is_main_process() -> bool:
    """Under torchrun, one process talks for all. A RANK that was left in the environment silences nobody."""
    several = os.environ.get("WORLD_SIZE", "") not in ("", "0", "1")
    return not several or os.environ.get("RANK", "0") == "0"


def log(line: str) -> None:
    """A line for the user in the log "finetune", from the main process."""
    if is_main_process():
        LOGGER.info("%s", line)


@contextmanager
def logged() -> Iterator[None]:
    """Inside the block, progress goes to the logger "finetune" as lines of level INFO.

    An application that configured logging decides whether and where they are shown. If none did, they are shown for
    the length of the block: on stderr, in a notebook below its cell. "Configured" means that this logger has a level,
    or that it or the root has a handler; a notebook's own handlers on the root (Colab has one) do not count.
    """
    if not is_main_process():
        yield
        return
    with _shown_by_default(), sent_to(ProgressLines(log)):
        yield


@contextmanager
def _shown_by_default() -> Iterator[None]:
    notebook = _in_notebook()
    if LOGGER.level != logging.NOTSET or LOGGER.handlers or (LOGGER.hasHandlers() and not notebook):
        yield
        return
    handler = logging.StreamHandler(sys.stdout if notebook else sys.stderr)
    propagate = LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # or a notebook's own handler shows each line again
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(logging.NOTSET)
        LOGGER.propagate = propagate


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and hasattr(shell.get_ipython(), "kernel")
