"""The program that started this process as one of several: a process whose launcher has died ends soon after it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

LOOK_EVERY = 1.0  # seconds
LAST_WORDS: list[Callable[[str], None]] = []  # told to the other processes before this one ends
_WATCHING = threading.Lock()


def end_with_launcher() -> None:
    """From now on this process ends within two seconds of its launcher's death (torchrun's agent, or `--processes`).

    A launcher that was killed can't end its workers, which would train on, or wait for each other for ever. Nothing
    happens in a process that no such launcher started: a shell that started it may end before it.
    """
    alive = _launcher()
    if alive is None or not _WATCHING.acquire(blocking=False):
        return
    threading.Thread(target=_watch, args=(alive,), name="launcher", daemon=True).start()


def end_now(reason: str) -> None:
    """Ends this process at once, whatever its other threads wait for, with exit code 2 and one sentence."""
    sentence = f"error: {reason}; the last checkpoint is complete: go on with `finetune resume RUN`\n"
    with suppress(OSError):  # the terminal ended with the launcher
        os.write(2, sentence.encode())
    for tell in LAST_WORDS:
        telling = threading.Thread(target=tell, args=(reason,), daemon=True)
        telling.start()
        telling.join(2)  # a store whose machine is gone would block for ever
    os._exit(2)


def _launcher() -> Callable[[], bool] | None:
    """A function that tells whether the launcher is alive; None if there is none."""
    spawned = multiprocessing.parent_process()
    if spawned is not None and os.environ.get("WORLD_SIZE"):
        return spawned.is_alive
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(os, "getppid"):
        parent = os.getppid()
        return lambda: os.getppid() == parent
    return None


def _watch(alive: Callable[[], bool]) -> None:
    while alive():
        time.sleep(LOOK_EVERY)
    end_now("the launcher of this process has ended")
