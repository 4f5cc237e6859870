"""Signals that stop a run: in the training loop the step is finished and saved first; elsewhere work stops at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# SIGTERM comes from nobody on Windows; programs that end others gently send Ctrl-Break there
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))
SAME_KEYPRESS = 0.5  # seconds: a terminal and torchrun both pass one Ctrl-C on


class Interrupted(KeyboardInterrupt):
    """A signal that ends the work now; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """A wish that a run ends after its step: `stop.request()`, from any thread.

    Inside `deferred()` a wish is only noted in `received`, and raised at the end of it. Elsewhere `heed` raises it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_deferring = False

    def request(self, number: int = signal.SIGTERM) -> None:
        """`number`: the signal that the program's exit code tells."""
        if self.received is None:
            self.received = number

    def heed(self) -> None:
        """Ends the work here, if that was asked for and is not deferred."""
        if self.received is not None and not self.is_deferring:
            raise Interrupted(self.received)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self.is_deferring = True
        try:
            yield
        finally:
            self.is_deferring = False
        self.heed()


class Signals:
    """`with Signals(stop):` makes the STOPPING signals requests of `stop`, and gives them back at the end.

    While the stop is not deferred they end the work at once; a second SIGINT does so always.
    """

    def __init__(self, stop: Stop) -> None:
        self.stop = stop
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self.stop

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        before = self.stop.received
        again = before is not None and number == signal.SIGINT and time.monotonic() - self._at > SAME_KEYPRESS
        if before is None:
            self._at = time.monotonic()
        self.stop.request(number)
        if again or not self.stop.is_deferring:
            raise Interrupted(number)
