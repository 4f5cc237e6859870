"""CUDA graphs of a step: forward and backward of one shape are recorded once and then replayed as a whole.

A step of a small batch is a few thousand small kernels, and starting them one by one takes longer than computing them.
A recording holds the addresses of its inputs: whatever differs between steps must be a tensor that is given to it. So
everything drawn is made before (`Step.inputs`), and `Step.loss` is what is recorded. It has never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finetune.core.errors import first_line
from finetune.core.progress import log
from finetune.training.parcel import RECORDING, with_tensors
from finetune.training.step import Step, StepInputs

Capture = Callable[[nn.Module, tuple[Tensor, ...], Any], Callable[..., Tensor]]


class Recordable(nn.Module):
    """`Step.loss` as a function of tensors alone. Its other inputs are those of the example, without what a recording
    must not depend on: prompts, keys and image sizes."""

    def __init__(self, step: Step, inputs: StepInputs, cond: dict[str, Tensor]) -> None:
        super().__init__()
        self.trained = step.trained
        self._loss = step.loss
        self._example = {"inputs": inputs.anonymous(), "cond": cond}
        self.training = step.training

    def tensors(self) -> tuple[Tensor, ...]:
        """The example's tensors, each once."""
        found: dict[int, Tensor] = {}
        with_tensors(self._example, lambda tensor: found.setdefault(id(tensor), tensor))
        return tuple(found.values())

    def forward(self, *tensors: Tensor) -> Tensor:
        given = dict(zip(map(id, self.tensors()), tensors, strict=True))
        held: dict[str, Any] = with_tensors(self._example, lambda tensor: given[id(tensor)])
        return self._loss(held["inputs"], held["cond"])


class Graphs:
    """In place of `Step.loss`: one recording for each shape of a micro-batch.

    Weights that were moved, as previews do on a small GPU, are recorded anew: a recording would read and change the
    memory where they were. `accumulates`: gradients of several micro-batches are added. They then need memory of their
    own, since a replay overwrites that of the recording.
    """

    def __init__(self, step: Step, accumulates: bool, capture: Capture | None = None) -> None:
        self.step, self.accumulates, self.capture = step, accumulates, capture or captured
        self.made: dict[Any, Callable[..., Tensor]] = {}
        self._pool: Any = None
        self._weights = list(step.trained.parameters())
        self._places: list[int] = []

    def __call__(self, inputs: StepInputs, cond: dict[str, Tensor]) -> Tensor:
        example = Recordable(self.step, inputs, cond)
        tensors = example.tensors()
        batch = inputs.batch
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        form = (*cond, *batch.conditions, batch.mask is None, batch.extra is None, shapes)
        places = [weight.data_ptr() for weight in self._weights]
        if places != self._places:
            self.made.clear()
            self._pool, self._places = None, places
        if form not in self.made:
            if self._pool is None and tensors[0].device.type == "cuda":
                self._pool = torch.cuda.graph_pool_handle()
            try:
                self.made[form] = self.capture(example, tuple(tensor.clone() for tensor in tensors), self._pool)
            except RuntimeError as error:  # what CUDA can't record, or has no memory for
                self._give_up(error)
                return self.step.loss(inputs, cond)
        if self.accumulates:
            for parameter in self.step.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return self.made[form](*tensors)

    def _give_up(self, error: RuntimeError) -> None:
        """Computes this step and all others as they are. A recording that failed leaves CUDA as it was."""
        self.made.clear()
        self._pool, self.step.computed = None, self.step.loss
        log(
            f"run.compile is 'graphs', but a step can't be recorded ({first_line(error)}): this run goes on without "
            "recordings"
        )


def captured(loss: nn.Module, example: tuple[Tensor, ...], pool: Any) -> Callable[..., Tensor]:
    """The recorded forward and backward of `loss`, after three passes that warm it up."""
    kind = example[0].device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    # cached casts would not be recorded
    with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False), RECORDING:
        made: Any = torch.cuda.make_graphed_callables(loss, example, allow_unused_input=True, pool=pool)
    found: Callable[..., Tensor] = made
    return found
