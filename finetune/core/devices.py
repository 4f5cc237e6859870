"""The device to use, and what some devices do not support."""

from __future__ import annotations

import torch
from torch import Tensor

NO_FLOAT64 = ("mps",)  # Metal has no float64
GIB = 2**30
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def best_device() -> torch.device:
    """Returns the fastest device of this machine: an NVIDIA or AMD GPU, else an Apple GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def auto_precision() -> str:
    """Returns "bf16" on a CUDA GPU with native bf16 (Ampere and later), "fp16" on an older one, "fp32" elsewhere."""
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if native_bf16() else "fp16"


def machine() -> tuple[torch.device, torch.dtype]:
    """Returns the fastest device of this machine and the dtype that `run.precision: auto` chooses on it."""
    return best_device(), DTYPES[auto_precision()]


def native_bf16(index: int | None = None) -> bool:
    """Returns whether CUDA GPU number `index` (None: the current one) computes in bf16 natively.

    GPUs before NVIDIA's Ampere (T4, V100, RTX 20) emulate bf16, many times slower than fp16.
    """
    if index is None:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    with torch.cuda.device(index):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def exact_device(device: torch.device) -> torch.device:
    """Returns the device for float64 sums of tensors on `device`: the same one, or the CPU if it has no float64."""
    return torch.device("cpu") if device.type in NO_FLOAT64 else device


def doubled(values: Tensor) -> Tensor:
    """Returns the values in float64, with the same shape, on `exact_device` of their device."""
    return values.to(exact_device(values.device)).double()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a small tensor of the CPU on `device`. Under CUDA a copy from ordinary memory would wait for all that
    the device has still to do, so it is copied from pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def empty_cache() -> None:
    """Returns the memory that torch caches but no longer uses to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def gib(size: float) -> str:
    """Returns a size in bytes as text in GiB, such as "1.50 GiB"."""
    return f"{size / GIB:.2f} GiB"
