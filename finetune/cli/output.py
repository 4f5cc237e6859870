"""Progress on the command line: in a terminal one bar for each phase of a run, elsewhere plain lines."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from textwrap import wrap
from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from finetune.core.complaints import what_to_do
from finetune.core.events import Consumer, Event, PhaseAdvanced, PhaseEnded, PhaseStarted, sent_to
from finetune.core.logging import plain
from finetune.core.progress import LOGGER, ProgressLines, is_main_process


class Progress:
    """A consumer of events that shows how far they are. It shows nothing until a command calls `enable`."""

    def __init__(self) -> None:
        self._show: Consumer | None = None

    def enable(self) -> None:
        """Shows progress from now on: bars in a terminal, lines in a file, a pipe, a container's or a job's log."""
        self._show = self._show or (ProgressBars() if in_terminal() else ProgressLines(say))

    def __call__(self, event: Event) -> None:
        if self._show is not None:
            self._show(event)


TYPED = "finetune.typed"
RESUME = "resume"  # which goes on with the run's own settings
COLUMN = 18  # where the values of rows begin
WIDTH = 100  # of a terminal that does not tell
TRAIN_ONLY = ("--dry-run", "--skip-bad")


class PlainGroup(TyperGroup):
    """Says in plain words what is wrong with an option: typer repeats pydantic's, and knows no settings."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta.setdefault(TYPED, list(args))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if isinstance(error.__cause__, ValidationError):
                fault = error.__cause__.errors(include_url=False)[0]
                error.message = f"{str(fault['input'])[:80]!r}: {what_to_do(fault)}"
            raise
        except Exception as error:
            if type(error).__name__ == "NoSuchOption":  # click's, or that of typer's own copy of click
                _name_settings(error, ctx.meta.get(TYPED, []))
            raise


def _name_settings(error: Any, typed: list[str]) -> None:
    """Adds what to write to the refusal of an option whose name is that of a setting, as --steps for run.steps."""
    params, name = (error.ctx.command.params, error.ctx.info_name) if error.ctx else ([], "")
    takes_settings = any(param.name == "overrides" for param in params)
    if not takes_settings and name != RESUME:
        return
    from finetune.config.wrong_values import settings_named

    option = error.option_name
    found = settings_named(option.lstrip("-").replace("-", "_"))
    settings = [f"{name}={_value_of(option, typed)}" for name in found]
    if takes_settings and settings:
        said = f"there is no option {option}: write the setting, {' or '.join(map(_quoted_value, settings))}"
        error.message, error.possibilities = said, None
    elif option in TRAIN_ONLY or (settings and not takes_settings):
        words = _words(typed, [flag for param in params if getattr(param, "is_flag", False) for flag in param.opts])
        run = next((word for word in words if "=" not in word), "RUN")
        more = [option] if option in TRAIN_ONLY else settings[:1]
        error.message = train_instead(run, [*(word for word in words if "=" in word), *more])
        error.possibilities = None


def train_instead(run: str, more: list[str]) -> str:
    """Why `resume` takes nothing but the run's folder, and the command that does."""
    words = shlex.join([f"{run}/recipe.yaml", f"run.dir={run}", *more])
    return f"resume takes no settings, since it goes on with the run's own: use `finetune train {words}`"


def _words(typed: list[str], flags: list[str]) -> list[str]:
    """What was typed for a command that is neither an option nor an option's value."""
    return [
        text
        for before, text in pairwise(typed)
        if not text.startswith("-") and (not before.startswith("-") or "=" in before or before in flags)
    ]


def _value_of(option: str, typed: list[str]) -> str:
    """What was typed for an option; VALUE where nothing was."""
    for number, text in enumerate(typed):
        following = [text[len(option) + 1 :]] if text.startswith(f"{option}=") else typed[number + 1 : number + 2]
        if text.partition("=")[0] == option and following and not following[0].startswith("-"):
            return following[0]
    return "VALUE"


def _quoted_value(setting: str) -> str:
    """A setting with its value quoted for a shell."""
    name, _, value = setting.partition("=")
    return f"{name}={shlex.quote(value)}"


class ProgressBars:
    """A consumer of events that shows a bar for each phase."""

    def __init__(self) -> None:
        self._open: list[tuple[Any, Any]] = []  # (rich's Progress, its task), the innermost phase last

    def __call__(self, event: Event) -> None:
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
        self._open.append((progress, progress.add_task(event.title, total=event.total or None, note="", rate="")))


PROGRESS: ContextVar[Progress | None] = ContextVar("finetune_progress", default=None)


@contextmanager
def progress_shown() -> Iterator[None]:
    """Inside the block, a command can show its progress. The log is told that the command does it."""
    progress, handler = Progress(), logging.NullHandler()
    token = PROGRESS.set(progress)
    LOGGER.addHandler(handler)
    try:
        with sent_to(progress):
            yield
    finally:
        LOGGER.removeHandler(handler)
        PROGRESS.reset(token)


def in_terminal() -> bool:
    """Whether bars that are drawn over and over can be shown."""
    return sys.stdout.isatty() and os.environ.get("TERM", "") != "dumb"


def say(line: str) -> None:
    """Prints a line without terminal control codes, which file names and captions can contain."""
    typer.echo(plain(line))


def say_row(line: str) -> None:
    """Prints a row of two columns. In a terminal a long one goes on under its value; elsewhere it is one line, as any
    other text is."""
    rows = [plain(line)]
    if in_terminal() and rows[0][COLUMN - 2 : COLUMN] == "  " and rows[0][:COLUMN].strip():
        width = max(shutil.get_terminal_size((WIDTH, 24)).columns, 2 * COLUMN)
        rows = wrap(rows[0], width, subsequent_indent=" " * COLUMN, break_long_words=False, break_on_hyphens=False)
    for row in rows:
        typer.echo(row)


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


def loud() -> None:
    """Turns off other libraries' progress bars and shows ours."""
    from finetune.core.logging import quiet_bars

    quiet_bars()
    progress = PROGRESS.get()
    if progress is not None and is_main_process():
        progress.enable()
