"""What the next step needs is made in a thread, while the device computes this one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Gives `make(n)` for n in ascending order up to `last` - 1, where `make` is a pure function.

    With `threaded`, `make(n + 1)` begins in a thread as soon as `make(n)` is done; never two at a time. Its error is
    raised where its result is asked for, so that errors come in the same step and with the same words as without the
    thread. Use it in a `with` block: at its end the thread has ended.
    """

    def __init__(self, make: Callable[[int], T], last: int, threaded: bool) -> None:
        self._make, self._last = make, last
        self._pool = ThreadPoolExecutor(1, "finetune-next-step") if threaded else None
        self._next: tuple[int, Future[T]] | None = None

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def take(self, n: int) -> T:
        """Returns `make(n)`, and begins to make the next one."""
        if self._pool is None:
            return self._make(n)
        ready = self._next[1] if self._next is not None and self._next[0] == n else self._pool.submit(self._make, n)
        self._next = None
        found = ready.result()
        if n + 1 < self._last:
            self._next = n + 1, self._pool.submit(self._make, n + 1)
        return found

    def close(self) -> None:
        """Ends the thread, after what it is making."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
