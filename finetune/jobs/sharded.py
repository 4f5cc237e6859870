"""A run whose processes share one model (`run.shard`): what it needs, how its base is read, how it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from finetune.core.errors import BadInput
from finetune.families.hollow import Hollow
from finetune.families.loading import DiffusersFamily
from finetune.families.parts import Released
from finetune.jobs.prepare import Prepared
from finetune.training.accelerate import resolve_precision
from finetune.training.ema import copy_into
from finetune.training.peers import joined
from finetune.training.settings import Run
from finetune.training.trainer import Trainer

SPARE = 0.9  # of a GPU's memory, for a part that computes there alone


def is_cut(run: Run) -> bool:
    """Whether the run's weights are cut: one process has nobody to share them with."""
    return run.shard and joined().world > 1


def refuse_unshared(run: Run, folder: Path) -> None:
    """
    Raises:
        BadInput: the run is sharded, but in fp16, or not all of its processes see its folder.
    """
    if not is_cut(run):
        return
    if resolve_precision(run) == "fp16":
        raise BadInput("run.shard has no loss scaling, which run.precision fp16 needs: set run.precision=bf16 or fp32")
    peers = joined()
    if peers.of_folder(folder).world != peers.world:
        raise BadInput(
            f"run.shard writes checkpoints from every process, but not all of them see {folder}: choose a folder on a "
            "disk that all machines share, with run.dir=PATH"
        )


def can_draw(job: Prepared) -> bool:
    """Whether the denoiser fits whole on this process's device, where images are drawn."""
    device = job.family.device
    if not is_cut(job.recipe.run) or device.type != "cuda":
        return True
    size = sum(weight.numel() * weight.element_size() for weight in job.family.parts["denoiser"].parameters())
    return bool(size < SPARE * torch.cuda.get_device_properties(device).total_memory)


def hollowed(job: Prepared, idle: Sequence[str]) -> Callable[[nn.Module], None] | None:
    """Drops the trained denoiser's weights, and leaves its structure in its place; the trained parts stay off the
    device until they are cut. Returns what reads the weights of one of its modules; None where they are kept, because
    the files name them otherwise than the model: then every process holds them once in the CPU's memory."""
    family, trained = job.family, job.recipe.method.part_names(job.family)
    family.parts.place([part for part in family.parts if part not in (*idle, *trained)])
    if "denoiser" not in trained or not isinstance(family, DiffusersFamily) or family.widened:
        return None
    try:
        hollow = Hollow(family.sources["denoiser"], family.folder, family.parts.dtype("denoiser"))
    except BadInput:
        return None
    family.parts["denoiser"] = hollow.module
    return hollow.fill


def put_together(job: Prepared, trainer: Trainer) -> None:
    """Afterwards the main process's family holds the trained weights in one piece, in the CPU's memory: its base is
    read again. The other processes hold none. Without shards it does nothing."""
    if trainer.held.pieces == 1:
        return
    family, method = job.family, job.recipe.method
    parts, whole = method.part_names(family), trainer.held.gathered()
    for name in parts:
        family.parts[name] = Released(family.parts[name])
    if whole is None:
        return
    family.parts.restore(parts)
    copy_into(method.attach(family, job.recipe.run.seed), whole)
