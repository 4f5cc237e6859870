"""`run.weights: bf16`: the trained weights are held in bf16 and updated with stochastic rounding (arXiv:2010.06192).

bf16 has 8 bits of precision. Rounded to the nearest, a weight loses every update below a 512th of it; rounded up or
down with probabilities in proportion to the distances, it moves as far as the update on average. An update is computed
in fp32 by the usual optimiser, for as few weights at a time as `CHUNK` says, so that no second copy of all weights is
in memory. torchao's `bf16_stochastic_round` does the same. Nothing here reads a number from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.core.rng import derived_seed
from finetune.optim.base import Optimiser, Window
from finetune.training.settings import Run

CHUNK = 2**24  # values whose update is computed together; a larger parameter is a chunk of its own
ALIGNED = 64  # values; kernels may read 16 bytes at once
SCRATCH = 20  # bytes for each value of a chunk: weight, gradient, noise, and the copies of one rounding
LOW = 0xFFFF  # the bits of an fp32 number that bf16 has not

Build = Callable[[Mapping[str, nn.Parameter]], Optimizer]


def build_optimizer(
    optim: Optimiser, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window], run: Run
) -> Optimizer:
    """The optimiser of a run for its weights as the run holds them.

    Raises:
        BadInput: as `Optimiser.build`.
    """
    if run.weights == "fp32":
        return optim.build(trained, windows)
    return RoundedOptimizer(trained, lambda stand_ins: optim.build(stand_ins, windows), run.seed)


def stochastic_round(value: Tensor, noise: Tensor) -> Tensor:
    """Rounds fp32 numbers to one of the two nearest bf16 numbers, up with the probability that makes the mean exact.

    Args:
        value: float32, any shape. What bf16 can hold stays, and so do infinity and NaN.
        noise: int32 of the same shape, uniform in 0 .. 65535. It is overwritten.

    Returns:
        bfloat16, the same shape.
    """
    bits = noise.add_(value.view(torch.int32)).bitwise_and_(~LOW)  # a carry out of the low bits rounds away from 0
    return torch.where(value.isnan(), value, bits.view(torch.float32)).bfloat16()  # CUDA's NaN would carry into -0


def scratch_bytes(sizes: Iterable[int]) -> float:
    """The memory in bytes that an update needs in addition, for parameters of these numbers of values."""
    counts = list(sizes)
    return float(SCRATCH * max(max(counts, default=0), min(CHUNK, sum(counts))))


class RoundedOptimizer(Optimizer):
    """Steps an optimiser of fp32 weights on weights in bf16.

    The inner optimiser has a stand-in for each weight, in fp32, with its shape but without memory. In a step the
    stand-ins of one chunk at a time get copies of their weights and gradients. Its state has its own precision, and is
    saved and loaded as if the weights were fp32. The rounding's numbers are a function of (seed, step, name).

    Attributes:
        number: the number of the next step, from 0; the loop sets it.
        inner: the optimiser of the stand-ins.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], build: Build, seed: int) -> None:
        self.seed, self.number = seed, 0
        self._shapes = {
            name: torch.zeros((), device=weight.device).expand(weight.shape) for name, weight in weights.items()
        }
        stand_ins = {name: nn.Parameter(shape) for name, shape in self._shapes.items()}
        self.inner = build(stand_ins)
        self._weights = dict(weights)
        self._names = {stand_in: name for name, stand_in in stand_ins.items()}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the inner optimiser leaves out an update when `found_inf` says so; then the weights are exact in
        bf16, and rounding leaves them as they are."""
        return getattr(self.inner, "_step_supports_amp_scaling", False)

    @property
    def found_inf(self) -> Tensor | None:
        return getattr(self.inner, "found_inf", None)

    @found_inf.setter
    def found_inf(self, value: Tensor) -> None:
        self.inner.found_inf = value  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self._weights.values():
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        groups = self.inner.param_groups
        try:
            for group in groups:
                for chunk in self._chunks(group["params"]):
                    self.inner.param_groups = [group | {"params": chunk}]
                    self._step_chunk(chunk)
        finally:
            self.inner.param_groups = groups

    def _chunks(self, stand_ins: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """The stand-ins of weights with a gradient, in their order, as many together as `CHUNK` holds."""
        chunk: list[nn.Parameter] = []
        size = 0
        for stand_in in stand_ins:
            if self._weights[self._names[stand_in]].grad is None:
                continue
            if chunk and size + stand_in.numel() > CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append(stand_in)
            size += stand_in.numel()
        if chunk:
            yield chunk

    def _step_chunk(self, chunk: Sequence[nn.Parameter]) -> None:
        names = [self._names[stand_in] for stand_in in chunk]
        weights = [self._weights[name].detach() for name in names]
        slopes = [grad for name in names if (grad := self._weights[name].grad) is not None]
        starts, total = _places(weights)
        values, gradients = torch.zeros(2, total, device=weights[0].device)
        copies, wide = (_views(flat, starts, weights) for flat in (values, gradients))
        torch._foreach_copy_(copies, weights)
        torch._foreach_copy_(wide, slopes)
        try:
            for stand_in, copy, slope in zip(chunk, copies, wide, strict=True):
                stand_in.data, stand_in.grad = copy, slope
            self.inner.step()
        finally:
            for name, stand_in in zip(names, chunk, strict=True):
                stand_in.data, stand_in.grad = self._shapes[name], None
        rounded = stochastic_round(values, self._noise(names, starts, weights, total))
        torch._foreach_copy_(weights, _views(rounded, starts, weights))

    def _noise(self, names: Sequence[str], starts: Sequence[int], weights: Sequence[Tensor], total: int) -> Tensor:
        """int32 [total], drawn on the weights' device, each weight's by a generator of its own."""
        noise = torch.zeros(total, dtype=torch.int32, device=weights[0].device)
        drawn = torch.Generator(noise.device)
        for name, start, weight in zip(names, starts, weights, strict=True):
            drawn.manual_seed(derived_seed(self.seed, f"rounding {name}", self.number))
            noise[start : start + weight.numel()].random_(0, LOW + 1, generator=drawn)
        return noise


def _places(weights: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each weight begins in a flat buffer, and the buffer's length."""
    starts, end = [], 0
    for weight in weights:
        starts.append(end)
        end += -(-weight.numel() // ALIGNED) * ALIGNED
    return starts, end


def _views(flat: Tensor, starts: Sequence[int], weights: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a flat buffer, each with its weight's shape."""
    pairs = zip(starts, weights, strict=True)
    return [flat[start : start + weight.numel()].view(weight.shape) for start, weight in pairs]
