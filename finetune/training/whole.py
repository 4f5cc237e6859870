"""Where the trained weights are: whole on every process, or in shards (`finetune.training.fsdp`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.training.checkpoint import Checkpoints, State, to_cpu
from finetune.training.shared_state import refuse_other_states, shared_state
from finetune.training.step import Step

MakeState = Callable[[], State]


class HeldWeights(Protocol):
    """How the processes of a run hold its weights. The loop asks nothing else about it.

    Attributes:
        parameters: name -> what this process holds of a trained parameter: the optimiser and the averages work on it.
        pieces: the number of pieces that each weight is cut into; 1 for whole weights.
        values: the number of values of all trained weights together, over all processes.
    """

    parameters: Mapping[str, nn.Parameter]
    pieces: int
    values: int

    def prepared(self, step: Step, optimizer: Any) -> tuple[Any, Any]:
        """The step and the optimiser, ready for the loop."""
        ...

    def clip(self, max_norm: float) -> Tensor | None:
        """Clips the gradients of all processes together. Returns their norm before."""
        ...

    def save(self, checkpoints: Checkpoints, made: MakeState, keep: int) -> Callable[[], Path] | None:
        """Copies the state for a checkpoint; all processes call it. Returns what writes it, perhaps in a thread, and
        gives its folder; None on other processes than the main one."""
        ...

    def read(self, checkpoints: Checkpoints) -> State | None:
        """This process's share of the newest sound checkpoint; None if there is none."""
        ...

    def refuse_others(self, made: MakeState) -> None:
        """
        Raises:
            BadInput: afterwards some process would go on from another state.
        """
        ...

    def gathered(self) -> dict[str, Tensor] | None:
        """The trained weights in one piece, on the CPU of the main process; None where they are whole already, and on
        the other processes. All processes call it."""
        ...


class Whole:
    """Every process holds all weights. DistributedDataParallel keeps them equal."""

    pieces = 1

    def __init__(self, accelerator: Accelerator, trained: Mapping[str, nn.Parameter]) -> None:
        self.accelerator, self.parameters = accelerator, trained
        self.values = sum(parameter.numel() for parameter in trained.values())

    def prepared(self, step: Step, optimizer: Any) -> tuple[Any, Any]:
        model, prepared = self.accelerator.prepare(step, optimizer)
        return model, prepared

    def clip(self, max_norm: float) -> Tensor | None:
        weights = list(self.parameters.values())
        if any(weight.grad is not None and weight.dtype == torch.bfloat16 for weight in weights):
            return clip_in_fp32(weights, max_norm)
        norm: Tensor | None = self.accelerator.clip_grad_norm_(weights, max_norm)
        return norm

    def save(self, checkpoints: Checkpoints, made: MakeState, keep: int) -> Callable[[], Path] | None:
        return partial(checkpoints.save, in_memory(made()), keep) if self.accelerator.is_main_process else None

    def read(self, checkpoints: Checkpoints) -> State | None:
        return shared_state(checkpoints.latest, self.accelerator.device)

    def refuse_others(self, made: MakeState) -> None:
        refuse_other_states(lambda: in_memory(made()))

    def gathered(self) -> dict[str, Tensor] | None:
        return None


def clip_in_fp32(weights: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clips bf16 gradients by their norm, which torch would sum in bf16. Returns the norm before, in fp32."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
    return norm


def in_memory(state: State) -> State:
    """The same state with its tensors in the CPU's memory, where training does not change them."""
    trained, optimizer, ema = (to_cpu(part) for part in (state.trained, state.optimizer, state.ema))
    return State(state.step, trained, optimizer, ema, state.values, state.pieces)
