"""Which device there is, and what some devices lack."""

from __future__ import annotations

import torch
from torch import Tensor

NO_FLOAT64 = ("mps",)  # Metal has none


def best_device() -> torch.device:
    """Where work is fastest: an NVIDIA or AMD GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def native_bf16(index: int) -> bool:
    """Whether a GPU computes in bf16 itself: before NVIDIA's Ampere (T4, V100, RTX 20) it is emulated, and slow."""
    with torch.cuda.device(index):
        return torch.cuda.is_bf16_supported(including_emulation=False)


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
