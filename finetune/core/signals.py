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


class Signals:
    """`with Signals() as signals:` takes the STOPPING signals over and gives them back at the end.

    Inside `signals.deferred()` the first one is only noted in `received`, and raised at the end of it; a second
    SIGINT interrupts there too.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = False
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None and number == signal.SIGINT and time.monotonic() - self._at > SAME_KEYPRESS
        if self.received is None:
            self.received, self._at = number, time.monotonic()
        if again or not self._deferring:
            raise Interrupted(number)
