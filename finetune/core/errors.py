"""The errors that the command line shows to the user as one sentence."""

from __future__ import annotations

import errno
import shlex
from pathlib import Path

LONGEST = 300  # characters of another program's message inside ours
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DENIED = (errno.EACCES, errno.EROFS, errno.EPERM)
OTHER_THINGS = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT, errno.ELOOP)
NAMES = (errno.ENAMETOOLONG, errno.EINVAL)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:LONGEST]


def reason_of(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


class BadInput(ValueError):
    """Input that can't be used. The message says what is wrong, which value, and what to do. Exit code 2.

    `path` is the file or folder that the message names, or None.
    """

    def __init__(self, message: str = "", *, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class PromptCut(UserWarning):
    """A prompt is longer than a text encoder reads. The message names the prompt and the part that is ignored."""


class CheckFailed(RuntimeError):
    """A check on a result failed: an export differs, or a step is not finite. Exit code 1."""


class Stopped(BaseException):  # not a KeyboardInterrupt: typer would handle that and end the program
    """A signal (SIGINT or SIGTERM) with this `number` stopped the run in folder `path`. The run can be resumed."""

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(f"stopped; go on with: finetune resume {shlex.quote(str(path))}")
        self.number = number


def disk_sentence(error: OSError) -> str:
    """What the disk refused, as a sentence; "" for an error that names no file, which may be a bug."""
    place = error.filename2 or error.filename
    if error.errno in NO_SPACE or error.errno in DENIED:
        advice = "free some space" if error.errno in NO_SPACE else "choose a folder that you may write to"
        return f"{place or 'a file'} could not be written ({error.strerror}): {advice}"
    if place and error.errno in OTHER_THINGS:
        return f"{place} could not be used ({error.strerror}): look what is there, or give another path"
    if place and error.errno in NAMES:
        return f"{str(place)[:80]!r} can't be the name of a file ({error.strerror}): give another"
    return ""
