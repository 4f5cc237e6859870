"""Whether tensors may be read from pickles: inside a block, and never for a whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ALLOWED: ContextVar[bool] = ContextVar("pickles allowed", default=False)


@contextmanager
def pickles_allowed(wanted: bool = True) -> Iterator[None]:
    """Inside the block weights in `.bin` files are read too: tensors only, no code is run. Processes that the block
    starts are told by their own arguments."""
    token = _ALLOWED.set(wanted)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def may_read_pickles() -> bool:
    return _ALLOWED.get()
