"""Progress on the command line: one bar for each phase of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from finetune.core.complaints import what_to_do
from finetune.core.events import Event, PhaseAdvanced, PhaseEnded, PhaseStarted, sent_to


class PlainGroup(TyperGroup):
    """Says in plain words what is wrong with an option: typer repeats pydantic's."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if isinstance(error.__cause__, ValidationError):
                fault = error.__cause__.errors(include_url=False)[0]
                error.message = f"{str(fault['input'])[:80]!r}: {what_to_do(fault)}"
            raise


class ProgressBars:
    """A consumer of events that shows progress bars. It shows nothing until a command calls `enable`."""

    def __init__(self) -> None:
        self.is_enabled = False
        self._open: list[tuple[Any, Any]] = []  # (rich's Progress, its task), the innermost phase last

    def enable(self) -> None:
        """Shows progress bars from now on."""
        self.is_enabled = True

    def __call__(self, event: Event) -> None:
        if not self.is_enabled:
            return
        if isinstance(event, PhaseStarted):
            self._start(event)
        elif isinstance(event, PhaseAdvanced) and self._open:
            progress, task = self._open[-1]
            progress.update(task, advance=event.amount, note=event.note)
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:.1f}/s" if speed else "")
        elif isinstance(event, PhaseEnded) and self._open:
            self._open.pop()[0].stop()
            if self._open:
                self._open[-1][0].start()

    def _start(self, event: PhaseStarted) -> None:
        """rich shows one live bar at a time, so the outer phase's bar pauses."""
        if self._open:
            self._open[-1][0].stop()
        progress = _bar()
        progress.start()
        self._open.append((progress, progress.add_task(event.title, total=event.total, note="", rate="")))


PROGRESS_BARS: ContextVar[ProgressBars | None] = ContextVar("finetune_progress_bars", default=None)


@contextmanager
def progress_bars() -> Iterator[None]:
    """Inside the block, events go to progress bars, which a command can enable."""
    bars = ProgressBars()
    token = PROGRESS_BARS.set(bars)
    try:
        with sent_to(bars):
            yield
    finally:
        PROGRESS_BARS.reset(token)


def _bar() -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, refresh_per_second=4)


def is_main_process() -> bool:
    """Under torchrun, one process talks for all."""
    return os.environ.get("RANK", "0") == "0"


def loud() -> None:
    """Turns off other libraries' progress bars and turns on ours."""
    from finetune.core.logging import quiet_bars

    quiet_bars()
    bars = PROGRESS_BARS.get()
    if bars is not None and is_main_process():
        bars.enable()
