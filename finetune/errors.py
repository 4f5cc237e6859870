"""The two kinds of failure that a person is told about in one sentence."""

from __future__ import annotations


class BadInput(ValueError):
    """The user's fault, with what, which value and what to do; the command line exits with 2."""


class CheckFailed(RuntimeError):
    """A check on a result did not hold (an export differs, a step is not finite); exits with 1."""
