"""Writes checkpoints in a thread, while the loop goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path


class Writing:
    """One file job at a time in a thread. `done` is called with its step and path, in the thread that asks.

    Use it in a `with` block: at its end all is written and the thread has ended.
    """

    def __init__(self, done: Callable[[int, Path], None]) -> None:
        self._done = done
        self._pool: ThreadPoolExecutor | None = None
        self._begun: tuple[int, Future[Path]] | None = None

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """An error of the thread is raised, or warned of if the block ends with another one."""
        try:
            self.settle()
        except Exception as failed:
            if error is None:
                raise
            warnings.warn(str(failed), stacklevel=2)
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=True)
                self._pool = None

    def begin(self, step: int, work: Callable[[], Path]) -> None:
        """Waits for the job before, and begins this one."""
        self.settle()
        self._pool = self._pool or ThreadPoolExecutor(1, "finetune-checkpoint")
        self._begun = step, self._pool.submit(work)

    def look(self) -> None:
        """As `settle`, if the job is done; else nothing."""
        if self._begun is not None and self._begun[1].done():
            self.settle()

    def settle(self) -> None:
        """Waits for the job. Raises its error, once."""
        if self._begun is None:
            return
        (step, job), self._begun = self._begun, None
        self._done(step, job.result())
