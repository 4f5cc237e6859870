"""Work in several threads, in order and with a bounded number of results in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
AHEAD = 4  # results for each thread that may wait to be taken


def core_count() -> int:
    """The number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Windows and macOS have none
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def mapped(function: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
    """Gives function(item) of each item, in their order. `items` is read as the results are taken.

    An error of `function` or of `items` ends the iteration, after the work that has begun. With one worker all of it
    happens in the calling thread.
    """
    if workers < 2:
        yield from map(function, items)
        return
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(workers, "finetune-worker") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
