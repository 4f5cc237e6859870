"""One progress bar per phase. Libraries stay quiet: nothing is shown until the command line calls `enable`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_enabled = False


def enable() -> None:
    global _enabled
    _enabled = True


def _silent(amount: int, note: str = "") -> None:
    """What `phase` gives while nothing is shown."""


@contextmanager
def phase(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """`with phase("Training", 250) as advance: advance(1, "loss 0.12")`: speed and time left are added."""
    if not _enabled:
        yield _silent
        return
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
    with Progress(*columns, refresh_per_second=4) as progress:
        task = progress.add_task(title, total=total, note="", rate="")

        def advance(amount: int, note: str = "") -> None:
            progress.update(task, advance=amount, note=note)
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:.1f}/s" if speed else "")

        yield advance
