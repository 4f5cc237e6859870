"""Ends a run in the middle as a kill would, for tests that resume it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from finetune.core.events import Event, StepDone, sent_to


class Killed(BaseException):
    """Ends a run. It is a BaseException, so `except Exception` does not catch it."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Ends the training inside the block at this step, before the step is logged and saved, and leaves the block.

    Raises:
        AssertionError: the training did not reach the step.
    """

    def kill(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            raise Killed

    try:
        with sent_to(kill):
            yield
    except Killed:
        return
    raise AssertionError(f"the training did not reach step {step}")
