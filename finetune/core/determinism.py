"""Deterministic mode: the settings of torch under which a CUDA run gives the same bits twice.

On a CPU with one number of threads the steps are deterministic anyway. On CUDA they are not: cuBLAS chooses its
workspace by what else runs, cuDNN may choose algorithms with atomic additions, and one attention backend has no
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
SIZES = (":4096:8", ":16:8")  # the two with which cuBLAS is deterministic
# cuDNN's attention has no deterministic backward pass; flash and memory-efficient attention have one in this mode
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside the block every operation is deterministic, or raises; afterwards torch is as it was.

    Raises:
        BadInput: CUDA is already in use without the workspace setting, or an operation has no deterministic form.
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
            f"run.deterministic is true but {operation} has no deterministic form on this device: set "
            "run.deterministic=false (a resumed run may then differ in its last bits)"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


def _set_workspace() -> None:
    """cuBLAS reads the variable when CUDA starts."""
    if os.environ.get(WORKSPACE) in SIZES:
        return
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        raise BadInput(
            f"run.deterministic is true but CUDA was already in use when this run began: start Python with "
            f"{WORKSPACE}={SIZES[0]} set"
        )
    os.environ[WORKSPACE] = SIZES[0]


def _operation(error: RuntimeError) -> str | None:
    """The operation that has no deterministic form; None for any other error.

    torch has no error of its own for it (`Context::alertNotDeterministic` raises a RuntimeError): only its text,
    "upsample_backward does not have a deterministic implementation, but you set ...", tells.
    """
    found = re.search(r"(\S+) does not have a deterministic implementation", str(error))
    return found[1] if found else None


def is_repeatable(device: torch.device | str, deterministic: bool) -> bool:
    """Whether the same steps on `device` give the same bits."""
    return deterministic or torch.device(device).type == "cpu"


@contextmanager
def threads_at_most(most: int) -> Iterator[None]:
    """At most so many of torch's threads inside the block; the number is the whole process's, and is given back."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(most, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
