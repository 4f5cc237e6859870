"""Deterministic mode: torch settings under which two equal CUDA runs give the same bits.

On a CPU with a fixed number of threads, steps are always deterministic. On CUDA they are not: the cuBLAS workspace
depends on what else is running, cuDNN may choose algorithms with atomic additions, and one attention backend has no
deterministic backward pass (https://docs.pytorch.org/docs/stable/notes/randomness.html).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune.core.errors import BadInput

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
SIZES = (":4096:8", ":16:8")  # cuBLAS is deterministic only with one of these two
# cuDNN's attention has no deterministic backward pass; flash and memory-efficient attention have one in this mode
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Makes every torch operation in the block deterministic. Afterwards, torch's settings are as before.

    Does nothing if `wanted` is False.

    Raises:
        BadInput: CUDA is already in use without the cuBLAS workspace setting, or an operation has no deterministic
            implementation.
    """
    if not wanted:
        yield
        return
    _set_workspace()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(ATTENTION):
            yield
    except RuntimeError as error:
        operation = _operation(error)
        if operation is None:
            raise
        raise BadInput(
            f"run.deterministic is true but {operation} has no deterministic implementation on this device: set "
            "run.deterministic=false (a resumed run may then differ in its last bits)"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


def _set_workspace() -> None:
    """Sets the environment variable that cuBLAS reads when CUDA starts."""
    if os.environ.get(WORKSPACE) in SIZES:
        return
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        raise BadInput(
            f"run.deterministic is true but CUDA was already in use when this run began: set the environment variable "
            f"{WORKSPACE}={SIZES[0]} before Python starts"
        )
    os.environ[WORKSPACE] = SIZES[0]


def _operation(error: RuntimeError) -> str | None:
    """The operation that has no deterministic implementation, or None for any other error.

    torch raises a plain RuntimeError (`Context::alertNotDeterministic`), so only its text identifies it:
    "upsample_backward does not have a deterministic implementation, but you set ...".
    """
    found = re.search(r"(\S+) does not have a deterministic implementation", str(error))
    return found[1] if found else None


def is_repeatable(device: torch.device | str, deterministic: bool) -> bool:
    """Returns whether the same steps on `device` give the same bits."""
    return deterministic or torch.device(device).type == "cpu"


@contextmanager
def threads_at_most(most: int) -> Iterator[None]:
    """Limits torch to `most` threads in the block. It holds for the whole process, until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(most, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
