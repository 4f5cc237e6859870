"""How the C library gives memory to activations."""

from __future__ import annotations

import ctypes
import os
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST_MMAP_THRESHOLD = 2**25  # bytes; glibc takes no larger one (HEAP_MAX_SIZE / 2)
KEPT = 2**30  # bytes


def keep_freed_memory() -> bool:
    """Tells glibc to keep up to 1 GiB of freed memory in this process, for the next tensors of up to 32 MiB.

    By default it gives the memory of large tensors back to the system when they are freed, and the system fills each
    page with zeros again for the next one: 15 % of the CPU time of drawing on a CPU. Larger tensors, such as most
    weights of a real base, are given back as ever. Values that are computed stay the same.

    It holds for the whole process and can't be undone, so only a program that owns its process may call it.

    Returns:
        Whether it was done; False with another C library.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return False
    thresholds = {M_MMAP_THRESHOLD: LARGEST_MMAP_THRESHOLD, M_TRIM_THRESHOLD: KEPT}
    taken = [mallopt(name, size) for name, size in thresholds.items()]  # 1: it was accepted
    return all(taken)


def give_back_freed_memory() -> bool:
    """Gives all pages that are free back to the system, also between pieces that are in use.

    Threads that decode and encode pictures, each with a heap of its own, leave such pages behind: 40 MB for 1,000
    pictures of 64 pixels. Values that are computed stay the same.

    Returns:
        Whether it was done; False with another C library.
    """
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))
    return malloc_trim is not None


def _of_glibc(name: str) -> Any:
    """A function of glibc; None with another C library, also one that has glibc's constants, as musl does."""
    if "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}):
        return None
    return getattr(ctypes.CDLL(None), name, None)
