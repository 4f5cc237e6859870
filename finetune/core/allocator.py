"""The C library's memory allocator: for a process that allocates the same large blocks in every step."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # the numbers of these parameters in glibc's malloc.h
NEVER = 2**31 - 1


def keep_memory() -> bool:
    """Makes glibc keep freed memory for the next step, instead of returning each large block to the system.

    Without it, every large tensor is mapped, filled with zeros and unmapped again. It holds for the whole process, so
    only commands call this. Returns whether there is a glibc that did it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, NEVER))
