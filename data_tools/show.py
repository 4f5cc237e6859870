"""What the commands share on the command line: their options, and how a result is printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.logging import plain

if TYPE_CHECKING:
    from data_tools.work import Prepared

SHOWN = 20  # lines about single photos; the manifest has all
LEFT_OUT = "left out"
SAME = ("copied", "good", "packed")  # actions that need no line of their own


def say(line: str) -> None:
    """Prints a line without terminal control codes, which file names and captions can contain."""
    print(plain(line))


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Adds PHOTOS, OUT, --dry-run and --json, which every command that writes has."""
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="a folder of photos; it stays as it is")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    add_run(parser)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds --dry-run and --json."""
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--undo", metavar="FOLDER", help="take back what a command wrote: its unchanged files")


def whole_number(least: int, of: str) -> Callable[[str], int]:
    """Returns argparse's reader of a whole number of at least `least`. `of` says what is counted."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number of {of}: give a whole number of at least {least}"
            )
        return int(text)

    return read


def say_json(values: Any) -> None:
    """Prints JSON in ASCII: a pipe may have any encoding."""
    print(json.dumps(values, indent=2))


def say_prepared(done: Prepared, as_json: bool) -> int:
    """Prints what a command did, and returns its exit code."""
    if as_json:
        say_json(done.values())
        return 0
    told = [step for step in done.plan.steps if step.action not in SAME]
    if len(told) > SHOWN:
        told.sort(key=lambda step: step.action != LEFT_OUT)  # what is missing must not be among those "more"
    lines = [step.line for step in told]
    for line in lines[:SHOWN]:
        say(line)
    if len(lines) > SHOWN:
        say(f"... and {len(lines) - SHOWN} more")
    for note in done.plan.notes:
        say(f"note: {note}")
    say(done.sentence)
    say(f"nothing was written (--dry-run): it would be {done.out}" if done.dry_run else f"written: {done.out}")
    return 0
