"""A run that ends in the middle, as a kill would end it: for tests that go on with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from finetune.core.events import Event, StepDone, sent_to


class Killed(BaseException):
    """No `except Exception` catches it."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """The training inside the block ends at this step, before it is logged and saved; the block ends there too.

    Raises:
        AssertionError: the step never came.
    """

    def kill(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            raise Killed

    try:
        with sent_to(kill):
            yield
    except Killed:
        return
    raise AssertionError(f"step {step} never came")
