"""The clean base on which exports are checked: where it is placed, and which checks share it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finetune.core.devices import DTYPES
from finetune.export.settings import Verify
from finetune.families.base import Family

Load = Callable[[torch.dtype], Family]  # loads a clean base in this precision, on the CPU


@dataclass
class CleanBase:
    """A clean base that the checks of one export share, and its own prediction for `finetune.export.verify.probe`."""

    family: Family | None = None
    prediction: Tensor | None = None


@dataclass(frozen=True)
class Bench:
    """Where and how thoroughly exports are checked.

    `device`, `dtype`: where the clean base for a check is placed, and its precision. `load`: loads that base; only one
    is in memory at a time. `verify`: the recipe's `export.verify`.
    """

    device: torch.device
    dtype: torch.dtype
    load: Load
    verify: Verify = "full"
    kept: CleanBase = field(default_factory=CleanBase, compare=False)

    @classmethod
    def of(cls, family: Family, load: Load, verify: Verify = "full") -> Bench:
        """A bench on the device of `family` and in its denoiser's precision."""
        return cls(family.device, family.parts.dtype("denoiser"), load, verify)

    @contextmanager
    def clean(self) -> Iterator[Family]:
        """Gives a clean base for the block, which may change it, and frees its memory afterwards."""
        family = self.take()
        try:
            with full_fp32():
                yield family
        finally:
            discard(family)

    @contextmanager
    def lent(self) -> Iterator[Family]:
        """Gives a clean base for the block, which must undo what it does to it: the next check gets the same one.

        A base that is not as it was, down to the last weight, is not lent again. `close` frees its memory.
        """
        family = self.kept.family = self.kept.family or self._loaded()
        before, whole = _state_of(family), False
        try:
            with full_fp32():
                yield family
            whole = _state_of(family) == before
        finally:
            if not whole:
                self.close()

    def prediction(self, probe: Callable[[Family], Tensor]) -> Tensor:
        """The `probe` of the lent base, asked once for all formats; to be called before it is changed."""
        assert self.kept.family is not None
        if self.kept.prediction is None:
            self.kept.prediction = probe(self.kept.family)
        return self.kept.prediction

    def take(self) -> Family:
        """A clean base for the caller, who may change it: the one that `lent` has kept, or a new one."""
        family, self.kept.family, self.kept.prediction = self.kept.family, None, None
        return family or self._loaded()

    def close(self) -> None:
        """Frees the memory of the base that is kept for the next check."""
        if self.kept.family is not None:
            discard(self.take())

    def _loaded(self) -> Family:
        family = self.load(self.dtype)
        family.parts.to(self.device)
        return family

    @property
    def precision(self) -> str:
        """The name of `dtype`: "fp32", "fp16" or "bf16"."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def _state_of(family: Family) -> list[tuple[str, int, int]]:
    """Changes with every module that is replaced, and with every weight that is written to or put elsewhere."""
    return [
        (f"{part}.{name}", value.data_ptr(), value._version)
        for part, module in family.parts.items()
        for name, value in (*module.named_parameters(), *module.named_buffers())
    ]


def discard(family: Family) -> None:
    """Frees the memory of a family's weights, even if other objects still refer to the family."""
    family.parts.keep_released = False
    family.parts.release(list(family.parts))
    gc.collect()  # pipelines and adapted layers may form reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def full_fp32() -> Iterator[None]:
    """Switches TF32 off inside the block. With TF32, GPUs round the inputs of fp32 products and convolutions to a
    10-bit mantissa, and the error bounds for fp32 do not hold."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = False, False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
