"""Signs of life between the processes of a run, so that none waits long for one that is dead."""

from __future__ import annotations

import atexit
import json
import os
import platform
import threading
from typing import Any

from finetune.core.launcher import LAST_WORDS, end_now

BEAT = 2.0  # seconds between two signs of life
GRACE = 15  # seconds for a process to end by itself once the run has failed elsewhere
LEAVE = 5.0  # seconds for the store to answer what it was asked before the process ended


def silence_allowed() -> float:
    """Seconds of silence after which a process counts as lost: 180, or $FINETUNE_PEER_TIMEOUT."""
    return float(os.environ.get("FINETUNE_PEER_TIMEOUT") or 180)


class Heartbeat:
    """Tells the others that this process lives, and ends it if another one of the run does not.

    One thread talks to the store, which may block if its machine is gone; the other one only counts seconds. It counts
    its own, so that a run that was paused as a whole is not taken for dead.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.prefix: str | None = None  # of the run that is at work
        self.failure: str | None = None  # what another process announced
        self._silent = [0.0] * world  # seconds
        self._beats = [b""] * world
        self._failing = 0.0
        self._left = threading.Event()

    def start(self) -> None:
        """Starts both threads, once all processes have given a sign; they end with the process.

        The one that talks is waited for: Python ends a thread that comes back from C++ code while the interpreter goes
        down, and the store's code then aborts the process (SIGABRT at the end of a run that succeeded).
        """
        talking, guarding = (
            threading.Thread(target=work, name="heartbeat", daemon=True) for work in (self._talk, self._guard)
        )
        talking.start()
        guarding.start()
        atexit.register(self._leave, talking)
        LAST_WORDS.append(self._say_why)

    def _leave(self, talking: threading.Thread) -> None:
        self._left.set()
        talking.join(LEAVE)

    def begin(self, prefix: str) -> None:
        """A run begins: from now on the others must live."""
        self.failure, self._failing, self._silent = None, 0.0, [0.0] * self.world
        self.prefix = prefix

    def end(self) -> None:
        """The run is over: the others may end."""
        self.prefix = None

    def sign(self, number: int = 0) -> None:
        """Leaves a sign of life; each has another number."""
        self.store.set(f"finetune/beat/{self.rank}", str(number))

    def _say_why(self, reason: str) -> None:
        if self.prefix is not None:
            said = json.dumps(["input", f"process {self.rank} of {self.world} ended: {reason}", platform.node()])
            self.store.compare_set(f"{self.prefix}/failed", "", said)

    def _talk(self) -> None:
        number = 0
        while not self._left.is_set():
            number += 1
            try:
                self.sign(number)
                self._listen()
            except RuntimeError:  # the store is gone, with the process or the agent that held it
                self.failure = self.failure or json.dumps(["lost", ""])
                return
            self._left.wait(BEAT)

    def _listen(self) -> None:
        beats = self.store.multi_get([f"finetune/beat/{other}" for other in range(self.world)])
        for other, beat in enumerate(beats):
            if beat != self._beats[other]:
                self._beats[other], self._silent[other] = beat, 0.0
        prefix = self.prefix
        if prefix is not None and self.failure is None and self.store.check([f"{prefix}/failed"]):
            self.failure = self.store.get(f"{prefix}/failed").decode()

    def _guard(self) -> None:
        while not self._left.wait(1):
            if self.prefix is None:
                continue
            self._silent = [seconds + 1 for seconds in self._silent]
            self._failing += self.failure is not None
            lost = [other for other, seconds in enumerate(self._silent) if seconds > silence_allowed()]
            if self._failing > GRACE:
                end_now("another process of the run has failed or ended")
            if lost:
                end_now(f"process {lost[0]} of {self.world} has not been heard of for {silence_allowed():g} seconds")
