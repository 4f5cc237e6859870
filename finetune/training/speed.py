"""What a recipe chooses for speed on a GPU: memory order, TF32, compiled blocks, CUDA graphs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._triton import has_triton

from finetune.core.progress import log
from finetune.training.dropout import SampleDropout
from finetune.training.graphs import Graphs
from finetune.training.settings import Run
from finetune.training.step import Step

DROPOUT = "dropout is drawn for each sample, which can't be compiled"
# forms of a block that are compiled: sizes of blocks x buckets x (with gradients, without). At torch's own limit of 8,
# two buckets of SD 1.5, all others would run uncompiled without a word
MOST_FORMS = 512


def apply_choices(step: Step, run: Run, device: torch.device, world: int) -> None:
    """Arranges a step, which is on `device`, as `run.channels_last` and `run.compile` say. What can't be done is left
    out, with a sentence for the user."""
    if run.channels_last:
        for part in step.trained.values():
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if run.compile == "off":
        return
    why = why_not_graphs(step, device, world) if run.compile == "graphs" else why_not_regional(step, device)
    if why:
        log(f"run.compile is {run.compile!r}, but {why}: this run trains without it")
    elif run.compile == "graphs":
        step.computed = Graphs(step, run.accumulate > 1)
    else:
        compile_regions(step)


def why_not_graphs(step: Step, device: torch.device, world: int) -> str:
    """Why a step can't be recorded as a CUDA graph; "" if it can."""
    reasons = {
        "CUDA graphs need a CUDA GPU": device.type != "cuda",
        "several processes are not recorded": world > 1,
        "text encoders are trained": set(step.trained) != {"denoiser"},
        "a prior's penalty changes from step to step": bool(step.options.regularizers or step.options.teacher),
        DROPOUT: _has_dropout(step),
        "gradient checkpointing can't be recorded": any(
            getattr(part, "is_gradient_checkpointing", False)
            for name, part in step.trained.items()
            if name == "denoiser"
        ),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def why_not_regional(step: Step, device: torch.device) -> str:
    """Why the blocks of a step can't be compiled; "" if they can."""
    if _has_dropout(step):
        return DROPOUT
    if not _blocks(step):
        return "the base has no repeated blocks that are trained"
    return _lacks_compiler() if device.type == "cuda" else ""


def _lacks_compiler() -> str:
    """What torch's compiler needs for a GPU and does not find; "" if it has all."""
    if not has_triton():
        return "torch compiles for this GPU with Triton, which is not installed or does not know the GPU"
    compilers = [name for name in (os.environ.get("CC"), "gcc", "clang") if name]
    found = any(shutil.which(name) for name in compilers)
    return "" if found else "Triton needs a C compiler, and there is no gcc or clang (or what CC names)"


def _has_dropout(step: Step) -> bool:
    return any(isinstance(module, SampleDropout) for module in step.modules())


def compile_regions(step: Step, **options: Any) -> None:
    """Compiles the repeated blocks of the trained denoiser in place: equal blocks share their code. They are compiled
    when they first run. `options`: those of `torch.compile`."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, MOST_FORMS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, MOST_FORMS)
    for block in _blocks(step):
        block.compile(**{"dynamic": False, **options})


def _blocks(step: Step) -> list[nn.Module]:
    """The modules that diffusers names as repeated, or as those that are not split."""
    if "denoiser" not in step.trained:
        return []
    denoiser: Any = step.trained["denoiser"]
    names = getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None) or ()
    return [module for module in denoiser.modules() if type(module).__name__ in names]


@contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """In the block, fp32 products and convolutions on NVIDIA GPUs from Ampere on round their inputs to TF32 (10 bits
    of mantissa), which is several times as fast; or they do not, as torch's convolutions would by default."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = wanted
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
