"""A device that is not there: tensors on it have shapes, dtypes and gradients but no values, as in torch's fake mode.

Tensors on the CPU stay real, so that what is decided there (dropped captions, token ids) is decided as in a run. What
torch would refuse on a GPU is refused: operands on two devices, and a generator of another device. Every copy to the
device and every read from it is counted: under CUDA a read, and a copy from memory that is not pinned, waits.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import finetune

NAME = "fakegpu"
READ, COPY = "aten._local_scalar_dense.default", "aten.copy_.default"
PACKAGE = str(Path(finetune.__file__).parent)


class Module:
    """What torch asks of a device's module. `is_available` is False, so that nothing chooses the device by itself."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def register() -> torch.device:
    """Skips the test where this torch has no devices in Python."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices made in Python (_setup_privateuseone_for_python_backend)")
    if not hasattr(torch, NAME):

        class Hook(torch._C._acc.PrivateUse1Hooks):
            def is_available(self) -> bool:
                return False

            def has_primary_context(self, index: int) -> bool:
                return True

            def is_built(self) -> bool:
                return True

        backend_registration._setup_privateuseone_for_python_backend(NAME, Module(), Hook())
    return torch.device(NAME, 0)


class Generator(torch.Generator):
    """A generator that says which device it is of; torch has none for this one."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.of = torch.device(device).type
        return made


class FakeDevice(TorchDispatchMode):
    """Inside it `device` can be used. `copies` to it and `reads` from it are counted by who asked for them: the
    innermost function of this package. `without`: dtypes that the device does not have."""

    def __init__(self, device: torch.device, without: tuple[torch.dtype, ...] = ()) -> None:
        super().__init__()
        self.device, self.without = device, without
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.copies: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [leaf for leaf in tensors if isinstance(leaf, FakeTensor)]
        to = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if there and str(func) == READ:
            self.reads[_asker()] += 1
            return {torch.bool: True, torch.int64: 1}.get(there[0].dtype, 1.0)
        if there and to == "cpu":
            self.reads[_asker()] += 1
            return torch.ones(there[0].shape, dtype=kwargs.get("dtype") or there[0].dtype)
        if not there and to != NAME:
            return func(*args, **kwargs)
        if len(there) < len(tensors) and (to == NAME or str(func) == COPY):
            self.copies[_asker()] += 1
        return self._on_device(func, args, kwargs)

    def _on_device(self, func: Any, args: tuple, kwargs: dict) -> Any:
        with self.fake:
            args, kwargs = tree_map(self._faked, (args, kwargs))
            out = func(*args, **kwargs)
        lacking = [leaf.dtype for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.dtype in self.without]
        if lacking:
            raise TypeError(f"{func}: this device has no {lacking[0]}")
        return out

    def _faked(self, leaf: Any) -> Any:
        plain = isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)
        return self.fake.from_tensor(leaf) if plain else leaf


def _asker() -> str:
    """ "batch.Latents.to": the innermost function of the package that is running."""
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    module = Path(frame.f_code.co_filename).relative_to(PACKAGE).with_suffix("")
    return f"{'.'.join(module.parts)}.{frame.f_code.co_qualname}"


class Generators(TorchFunctionMode):
    """Refuses to draw on one device with a generator of another; the operators below it get a plain one."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if isinstance(generator, Generator):
            place = [arg.device for arg in args if isinstance(arg, Tensor)]
            to = torch.device(kwargs.get("device") or (place or ["cpu"])[0]).type
            if generator.of != to:
                raise RuntimeError(f"Expected a {to!r} device type for generator but found {generator.of!r}")
            kwargs = kwargs | ({} if to == "cpu" else {"generator": None})
        return func(*args, **kwargs)


def _move(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` by replacing, since torch's own swaps fake tensors in place, which it then refuses."""
    for child in self.children():
        _move(child, fn)
    for held in (self._parameters, self._buffers):
        for key, value in held.items():
            moved = value if value is None else fn(value.detach())
            if moved is not None and (moved.device, moved.dtype) != (value.device, value.dtype):
                held[key] = nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved
    return self


@contextmanager
def fake_device(patch: pytest.MonkeyPatch, *without: torch.dtype) -> Iterator[FakeDevice]:
    device = register()
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(nn.Module, "_apply", _move)
    with Generators(), FakeDevice(device, without) as mode:
        yield mode
