"""Signals that stop a run. The training loop first finishes and saves its step; other work stops at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Windows has no SIGTERM between processes: a program that asks another to end sends Ctrl-Break
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))
SAME_KEYPRESS = 0.5  # seconds: one Ctrl-C can arrive twice, from the terminal and from torchrun


class Interrupted(KeyboardInterrupt):
    """Raised by a signal that ends the work at once. `number` is the signal number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Asks a run to end after its current step: call `stop.request()` from any thread.

    `received` is the number of the signal that was requested, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_deferring = False

    def request(self, number: int = signal.SIGTERM) -> None:
        """Asks the run to end. `number` is the signal that the exit code reports; only the first request counts."""
        if self.received is None:
            self.received = number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets the block finish before a request takes effect.

        Raises:
            Interrupted: at the end of the block, if a stop was requested.
        """
        self.is_deferring = True
        try:
            yield
        finally:
            self.is_deferring = False
        if self.received is not None:
            raise Interrupted(self.received)


class Signals:
    """Inside `with Signals(stop):` the STOPPING signals call `stop.request`. Afterwards the old handlers are restored.

    Unless the stop is deferred, a signal also ends the work at once. A second SIGINT always does.
    """

    def __init__(self, stop: Stop) -> None:
        self.stop = stop
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
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
