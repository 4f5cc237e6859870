"""The unchanged base during training, and the distance of the trained weights from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor, nn

    from finetune.families.base import Family

ReferenceModel = Callable[[], AbstractContextManager["Family"]]  # a context manager: the unchanged base


def reference_copy(family: Family, parts: Sequence[str]) -> ReferenceModel:
    """A second family with copies of `parts`, in their current dtype. All other parts are shared."""
    twin = copy.copy(family)
    copies = {name: copy.deepcopy(family.parts[name]).requires_grad_(False).eval() for name in parts}
    shared = {name: part for name, part in family.parts.items() if name not in family.codec.parts}
    twin.parts = family.parts.replaced_by(shared | copies)
    return lambda: nullcontext(twin)


def adapters_disabled(family: Family, layers: Sequence[BaseTunerLayer]) -> ReferenceModel:
    """The same family with PEFT's layers disabled: nothing is copied."""

    @contextmanager
    def block() -> Iterator[Family]:
        _set_disabled(layers, True)
        try:
            yield family
        finally:
            _set_disabled(layers, False)

    return block


def _set_disabled(layers: Sequence[BaseTunerLayer], off: bool) -> None:
    """Used instead of PEFT's `enable_adapters`, which also changes requires_grad between a forward and its
    backward."""
    for layer in layers:
        layer._disable_adapters = off


def adapted_layers(family: Family, parts: Sequence[str]) -> list[Any]:
    return [layer for part in parts for _, layer in tuner_layers(family.parts[part])]


def tuner_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of the layers that PEFT added to a module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((path, layer) for path, layer in module.named_modules() if isinstance(layer, BaseTunerLayer))


def copied_distance(trained: Mapping[str, nn.Parameter]) -> Callable[[], Tensor]:
    """A function for sum |theta - theta_0|^2 over all trained weights; theta_0 is a copy of their current values."""
    import torch
    from torch.nn.functional import mse_loss

    start = {name: parameter.detach().clone() for name, parameter in trained.items()}

    def distance() -> Tensor:
        """mse_loss stores its inputs for the backward pass, not their difference, which would be a third copy."""
        return torch.stack([mse_loss(trained[name], start[name], reduction="sum") for name in start]).sum()

    return distance


def low_rank_distance(factors: Iterable[tuple[Tensor, Tensor, float]]) -> Callable[[], Tensor]:
    """A function for the sum over layers of |s B A|^2 (Frobenius norm).

    |B A|^2 = tr(A^T B^T B A) = tr((B^T B) (A A^T)) needs only two r x r matrices, not B A, which is as large as the
    base's weight. `factors` are (A [r, in, ...], B [out, r, ...], s). For a convolution, B A is their matrix product
    too, since its B is 1x1.
    """
    import torch

    held = list(factors)

    def distance() -> Tensor:
        with torch.autocast(held[0][0].device.type, enabled=False):
            return torch.stack([scale**2 * _squared_norm(a.flatten(1), b.flatten(1)) for a, b, scale in held]).sum()

    return distance


def _squared_norm(a: Tensor, b: Tensor) -> Tensor:
    return ((b.T @ b) * (a @ a.T)).sum()


def parameter_bytes(family: Family, parts: Sequence[str]) -> int:
    return sum(p.numel() * p.element_size() for part in parts for p in family.parts[part].parameters())
