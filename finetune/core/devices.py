"""Which device there is, and what some devices lack."""

from __future__ import annotations

import torch
from torch import Tensor

NO_FLOAT64 = ("mps",)  # Metal has none
GIB = 2**30
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def best_device() -> torch.device:
    """Where work is fastest: an NVIDIA or AMD GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def auto_precision() -> str:
    """bf16 on a CUDA GPU that computes in it (Ampere and later), fp16 on an older one, fp32 elsewhere."""
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if native_bf16() else "fp16"


def machine() -> tuple[torch.device, torch.dtype]:
    """The best device of this machine, and the dtype that `run.precision: auto` is there."""
    return best_device(), DTYPES[auto_precision()]


def native_bf16(index: int | None = None) -> bool:
    """Whether a GPU (None: the current one) computes in bf16 itself. Before NVIDIA's Ampere (T4, V100, RTX 20) it is
    emulated, and many times slower than fp16."""
    if index is None:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    with torch.cuda.device(index):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def exact_device(device: torch.device) -> torch.device:
    """Where sums in float64 are made for what lies on `device`: there, or on the CPU where that has no float64."""
    return torch.device("cpu") if device.type in NO_FLOAT64 else device


def doubled(values: Tensor) -> Tensor:
    """The same numbers in float64."""
    return values.to(exact_device(values.device)).double()


def empty_cache() -> None:
    """Gives memory that nothing holds any more back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def gib(size: float) -> str:
    """Bytes as text."""
    return f"{size / GIB:.2f} GiB"
