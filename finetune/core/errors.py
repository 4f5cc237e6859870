"""The kinds of failure that a person is told about in one sentence."""

from __future__ import annotations

from pathlib import Path


class BadInput(ValueError):
    """The user's fault, with what, which value and what to do; the command line exits with 2.

    `path` is the file or folder that the sentence names; None where it names none.
    """

    def __init__(self, message: str = "", *, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class CheckFailed(RuntimeError):
    """A check on a result did not hold (an export differs, a step is not finite); exits with 1."""


class Stopped(BaseException):  # not a KeyboardInterrupt: typer would end the program in our place
    """A signal (SIGINT or SIGTERM) stopped the run in `path`: it can go on from there."""

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(f"stopped; go on with: finetune resume {path}")
        self.number = number
