"""Permission to read tensors from pickle files. It holds inside a block, not for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ALLOWED: ContextVar[bool] = ContextVar("pickles allowed", default=False)


@contextmanager
def pickles_allowed(wanted: bool = True) -> Iterator[None]:
    """Allows weights in `.bin` files inside the block: only tensors are read, no code is run.

    The permission does not reach other processes: pass them their own argument.
    """
    token = _ALLOWED.set(wanted)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def may_read_pickles() -> bool:
    """Returns whether the current context allows weights in pickle files."""
    return _ALLOWED.get()
