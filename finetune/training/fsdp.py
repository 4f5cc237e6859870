"""Trains a model of which every process holds a part: `run.shard: true`, through FSDP2 (arXiv:2304.11277).

`fully_shard` cuts each weight into rows, one piece for each process, and gathers a block's weights only while it
computes. Optimiser, averages and clipping see this process's rows as plain tensors, so that every optimiser whose
update is elementwise works, bitsandbytes' too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from finetune.core.errors import BadInput
from finetune.families.recording import keep_recording
from finetune.training.blocks import cut_blocks
from finetune.training.checkpoint import Checkpoints, State
from finetune.training.peers import joined
from finetune.training.shard_files import Layout, read_pieces, write_shards
from finetune.training.step import Step
from finetune.training.whole import HeldWeights, MakeState, Whole

Fill = Callable[[nn.Module], None]


def held_weights(
    step: Step, trained: Mapping[str, nn.Parameter], accelerator: Accelerator, shard: bool, fill: Fill | None = None
) -> HeldWeights:
    """The trained weights as the run holds them. One process has nobody to share with: it holds them whole.

    Args:
        step: its trained parts are cut, if `shard`.
        trained: name -> parameter, from `Method.attach`.
        fill: reads the weights of a module that has none yet (`finetune.families.hollow`); None: all have theirs.
    """
    if shard and accelerator.num_processes > 1:
        return CutWeights(step, trained, accelerator, fill)
    return Whole(accelerator, trained)


class CutWeights:
    """This process's rows of every weight of the trained parts."""

    def __init__(
        self, step: Step, trained: Mapping[str, nn.Parameter], accelerator: Accelerator, fill: Fill | None = None
    ) -> None:
        self.accelerator, self.peers = accelerator, joined()
        self.pieces = accelerator.num_processes
        self.values = sum(parameter.numel() for parameter in trained.values())
        self.mesh = init_device_mesh(accelerator.device.type, (self.pieces,))
        for part in step.trained.values():
            shard_part(part, self.mesh, fill)
        found = {f"{name}.{key}": p for name, part in step.trained.items() for key, p in part.named_parameters()}
        self.cut = {name: cast(DTensor, found[name]) for name in trained}
        self.parameters: Mapping[str, nn.Parameter] = {
            name: nn.Parameter(_rows(value)) for name, value in self.cut.items()
        }
        self.order: Sequence[str] = ()

    def prepared(self, step: Step, optimizer: Any) -> tuple[Any, Any]:
        """`evaluation_mode` keeps DistributedDataParallel away, and autocast stays."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._bind()
        self.order = [names[id(item)] for group in optimizer.param_groups for item in group["params"]]
        model = self.accelerator.prepare_model(step, device_placement=False, evaluation_mode=True)
        return model, self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def clip(self, max_norm: float) -> Tensor | None:
        """Hands this process's rows of the gradients to the optimiser, clipped by the norm of all processes' rows."""
        self._bind()
        for name, value in self.cut.items():
            mine, gradient = self.parameters[name], cast("DTensor | None", value.grad)
            # a weight with fewer rows than processes has none here: bitsandbytes' kernels can't be started for nothing
            mine.grad = None if gradient is None or mine.numel() == 0 else gradient.to_local()
            value.grad = None
        gradients = [mine.grad for mine in self.parameters.values() if mine.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).to(self.accelerator.device).square()
        distributed.all_reduce(square)
        norm = square.sqrt()
        if max_norm < math.inf:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), max_norm, norm)
        return norm

    def _bind(self) -> None:
        """FSDP moves the rows to other memory when a module is moved, and when it first computes."""
        for name, value in self.cut.items():
            self.parameters[name].data = _rows(value)

    def save(self, checkpoints: Checkpoints, made: MakeState, keep: int) -> Callable[[], Path] | None:
        """Every process writes its rows into one folder, at once, which the main process then signs and renames."""
        if self.accelerator.is_main_process:
            folder = checkpoints.save(made(), keep, self._write)
            return lambda: folder
        try:
            self._write(None, made())
        except OSError as error:
            raise BadInput(f"the checkpoint could not be written by process {self.peers.rank}: {error}") from error
        return None

    def _write(self, folder: Path | None, state: State) -> None:
        place = self.peers.from_first(None if folder is None else str(folder))
        write_shards(Path(place), state, self._layout)

    @property
    def _layout(self) -> Layout:
        return Layout(self.cut, self.order, self.peers.rank, self.pieces)

    def read(self, checkpoints: Checkpoints) -> State | None:
        self._bind()
        newest = checkpoints.newest_sound() if self.accelerator.is_main_process else None
        folder = self.peers.from_first(None if newest is None else str(newest))
        return None if folder is None else read_pieces(Path(folder), self._layout)

    def refuse_others(self, made: MakeState) -> None:
        """All have read one folder: there is nothing to compare."""

    def gathered(self) -> dict[str, Tensor] | None:
        """One weight at a time, so that no process holds more than one in one piece on its device."""
        whole: dict[str, Tensor] = {}
        for name, value in self.cut.items():
            full = cast(DTensor, value.detach()).full_tensor()
            if self.accelerator.is_main_process:
                whole[name] = full.cpu()
        return whole if self.accelerator.is_main_process else None


def shard_part(part: nn.Module, mesh: DeviceMesh, fill: Fill | None = None) -> None:
    """Cuts the weights of a part, block by block, the inner blocks first; what is in no block is a block of its own.

    Only one block at a time is whole in memory if `fill` reads its weights now.
    """
    named = {module: str(type(module)) for module in part.modules()}
    for module in cut_blocks(part):
        if fill is not None:
            fill(module)
        fully_shard(module, mesh=mesh)
    keep_recording({old: str(type(module)) for module, old in named.items()})


def _rows(value: DTensor) -> Tensor:
    """This process's rows, in the same memory."""
    rows: Tensor = cast(DTensor, value.detach()).to_local()
    return rows
