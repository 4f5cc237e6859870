"""Sets up device, precision and processes with Accelerate."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers

from finetune.core.devices import auto_precision
from finetune.core.errors import BadInput
from finetune.data.batches import check_split
from finetune.training.peers import joined, on_cpu
from finetune.training.settings import Run

OTHERS = {
    "ACCELERATE_USE_FSDP": "weights are sharded with run.shard=true alone",
    "ACCELERATE_USE_DEEPSPEED": "weights are not sharded",
    "ACCELERATE_USE_MEGATRON_LM": "weights are not sharded",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "weights are not sharded",
}
ACCUMULATED, COMPILER = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND"


def make_accelerator(run: Run, adapter: bool) -> Accelerator:
    """An Accelerator with the recipe's device, precision, accumulation and processes.

    An adapter on a bf16 base trains without autocast: the adapter is fp32, and the base is cast once. Full training in
    bf16 keeps fp32 weights and uses autocast, unless they are bf16 too (`run.weights`). With fp16, both need
    Accelerate's loss scaling.

    Raises:
        BadInput: the machine or the launcher can't do what the recipe asks for.
    """
    precision = resolve_precision(run)
    check_machine(run)
    mixed = {"fp32": "no", "bf16": "no" if adapter or run.weights == "bf16" else "bf16", "fp16": "fp16"}[precision]
    _allow_another_precision(mixed)
    _refuse_environment(run)
    joined()  # sets up the process group, with the timeout of a step
    accelerator = Accelerator(
        mixed_precision=mixed,
        gradient_accumulation_steps=run.accumulate,
        log_with=list(run.trackers) or None,
        project_dir=".",  # trackers need one; `jobs.train` sets it once the run folder is known
        cpu=on_cpu(),
    )
    _check_launch(accelerator, run)
    return accelerator


def check_machine(run: Run) -> None:
    """
    Raises:
        BadInput: this machine lacks what the recipe asks for.
    """
    if resolve_precision(run) == "fp16" and not torch.cuda.is_available():
        raise BadInput("run.precision is 'fp16' but there is no CUDA GPU here: set run.precision=fp32 or bf16")
    if run.tf32 and not _has_tf32():
        raise BadInput("run.tf32 is true but there is no NVIDIA GPU with TF32 (Ampere or later) here: leave it out")
    installed = {str(tracker.value) for tracker in get_available_trackers()}
    missing = next((name for name in run.trackers if name not in installed), None)
    if missing is not None:  # Accelerate would leave it out in silence
        raise BadInput(f"run.trackers has {missing!r}, which is not installed: pip install {missing}, or leave it out")


def _has_tf32() -> bool:
    return torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability()[0] >= 8


def _allow_another_precision(mixed: str) -> None:
    """Lets a second run in this process use another precision, which Accelerate refuses. The process group is kept."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()


def _check_launch(accelerator: Accelerator, run: Run) -> None:
    """Checks the launch: some launchers start fewer processes than requested, and some settings silently change the
    precision."""
    world = accelerator.num_processes
    if world != joined().world:
        raise BadInput(
            f"{world} processes were started without WORLD_SIZE and MASTER_ADDR, as MPI does: start them with "
            "`finetune train --processes N` or torchrun"
        )
    if run.processes not in (None, world):
        raise BadInput(
            f"run.processes is {run.processes} but {world} process(es) were started: use `finetune train --processes "
            f"{run.processes}` or torchrun (`accelerate launch --cpu` always starts one)"
        )
    check_split(run.batch_size, run.accumulate, world)


def _refuse_environment(run: Run) -> None:
    """Refuses variables by which Accelerate would train another thing than the recipe says, without a word: it takes
    them before its arguments."""
    for name, what in OTHERS.items():
        if os.environ.get(name, "").lower() in ("1", "true"):
            raise BadInput(f"{name} is set, but {what} here: unset it")
    counted = os.environ.get(ACCUMULATED) or str(run.accumulate)
    if counted != str(run.accumulate):
        raise BadInput(
            f"{ACCUMULATED} is {counted!r} in the environment but run.accumulate is {run.accumulate}: unset it, or "
            "give the number as run.accumulate"
        )
    compiler = os.environ.get(COMPILER) or "no"
    if compiler.lower() != "no":
        raise BadInput(f"{COMPILER} is {compiler!r}, but models are not compiled here: unset it")


def resolve_precision(run: Run) -> str:
    """The value of `run.precision` on this machine: "fp32", "bf16" or "fp16". Weights in bf16 compute in bf16."""
    if run.precision == "auto":
        return "bf16" if run.weights == "bf16" else auto_precision()
    return run.precision
