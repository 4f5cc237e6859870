"""What started processes do with sharded weights: the trainer on batches from memory, case by case."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from finetune.methods.full import Full
from finetune.methods.lora import LoRA
from finetune.optim.adamw8bit import AdamW8bit
from finetune.optim.lion8bit import Lion8bit
from finetune.optim.schedule_free import ScheduleFree

BOTH: list[Any] = ["denoiser", "text_encoders"]
LORA = {"rank": 4, "dropout": 0.1, "parts": BOTH}
CASES: dict[str, dict[str, Any]] = {
    "sd1-lora": {"method": LoRA(**LORA), "ema": 0.9, "accumulate": 2},
    "sd1-full": {"method": Full(parts=BOTH), "ema": 0.9, "accumulate": 2},
    "sdxl-lora": {"method": LoRA(**LORA)},
    "flux-lora": {"method": LoRA(**LORA)},
    "flux-full": {"method": Full()},
    "sd1-adamw8bit": {"method": Full(), "optim": AdamW8bit(lr=1e-3)},
    "sd1-narrow": {"method": LoRA(rank=1), "optim": AdamW8bit(lr=1e-3), "ema": 0.9},  # a row for one process alone
    "sd1-lion8bit": {"method": Full(), "optim": Lion8bit(lr=1e-4)},
    "sd1-bf16": {"method": LoRA(**LORA), "precision": "bf16"},
    "sd1-schedule_free": {"method": LoRA(**LORA), "optim": ScheduleFree(lr=1e-3)},
}


def fits(arguments: list[str]) -> tuple[int, str]:
    """arguments: a folder, the folder of the bases, "shard" or "whole", and the names of cases."""
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "training")]
    import torch

    torch.set_num_threads(1)
    out, bases, how, *names = arguments
    for name in names:
        settings = {"steps": 4, "checkpoint_every": 2, "shard": how == "shard", **CASES[name]}
        if how == "whole" and "precision" in settings:  # the micro-batches of two processes: see docs/scale.md
            settings["accumulate"] = 2
        fit(Path(bases) / name.partition("-")[0], Path(out) / name, **settings)
    return 0, ""


def fit(base: Path, folder: Path, method: Any, optim: Any = None, **settings: Any) -> None:
    """Trains on batches from memory. The last checkpoint holds everything; memory.json what this process held."""
    from test_trainer import Memory

    from finetune.core.devices import DTYPES
    from finetune.core.events import sent_to
    from finetune.families.source import load_family
    from finetune.objectives.registry import build_objective
    from finetune.objectives.settings import ObjectiveSettings
    from finetune.optim.adamw import AdamW
    from finetune.runs.metrics import MetricsFile
    from finetune.training.accelerate import make_accelerator
    from finetune.training.checkpoint import Checkpoints
    from finetune.training.settings import Run
    from finetune.training.step import Step, parts_of
    from finetune.training.trainer import Trainable, Trainer

    folder.mkdir(parents=True, exist_ok=True)
    run = Run(batch_size=4, **{"precision": "fp32", **settings})
    accelerator = make_accelerator(run, method.is_adapter)
    family = load_family(str(base), dtype=method.weight_dtype(DTYPES[run.precision]))
    trained = method.attach(family, 0)
    objective = build_objective(ObjectiveSettings(), family.schedule)
    step = Step(family, parts_of(trained), objective, family.encode_prompts)
    optim = optim or AdamW(lr=1e-3, schedule="cosine", warmup=2)
    trainer = Trainer(step, Trainable(trained), optim, run, accelerator, Checkpoints(folder))
    rank, world = accelerator.process_index, accelerator.num_processes
    channels = 16 if base.name == "flux" else 4
    with sent_to(*([MetricsFile(folder)] if rank == 0 else [])):
        trainer.fit(Memory(4, run.accumulate, rank, world, channels=channels))
    (folder / f"memory-{rank}.json").write_text(json.dumps(held_bytes(trainer)))


def held_bytes(trainer: Any) -> int:
    """The bytes of this process's weights, their gradients, the optimiser's state and the averages, by their sizes."""
    from torch.distributed.tensor import DTensor

    weights = [p.to_local() if isinstance(p, DTensor) else p for p in trainer.step.parameters()]
    trained = list(trainer.trained.values())
    kept = [value for state in trainer.optimizer.state.values() for value in state.values() if hasattr(value, "numel")]
    held = [*weights, *trained, *kept, *trainer.ema.averages.values()]  # a gradient is as large as its weight
    return sum(value.numel() * value.element_size() for value in held)


SETTINGS = (
    "data.class_noun=mug", "data.token=zwx", "run.batch_size=4", "run.steps=4", "sample.steps=1", "sample.count=1",
    "sample.prompts=['a {noun}']", "export.verify=off", "optim.kind=adamw", "run.verdicts=off",
)  # fmt: skip
JOBS = {
    "lora": (
        "dreambooth-lora", "method.rank=4", "method.parts=[denoiser, text_encoders]", "prior.kind=frozen_base",
        "run.gradient_checkpointing=true", "run.ema=0.9", "run.accumulate=2", "run.checkpoint_every=2",
    ),
    "full": ("dreambooth-full", "prior.kind=none"),
}  # fmt: skip


def jobs(arguments: list[str]) -> tuple[int, str]:
    """arguments: a folder, the photos, the folder of the bases, more settings in JSON, and "<family>-<job>" each."""
    from finetune.core.logging import quiet, quiet_bars

    quiet()
    quiet_bars()
    import torch

    from finetune import load_recipe, train
    from finetune.core.errors import BadInput

    torch.set_num_threads(1)
    out, photos, bases, more, *names = arguments
    os.environ["FINETUNE_CACHE"] = str(Path(out) / "cache")
    for name in names:
        family, _, kind = name.partition("-")
        preset, *own = JOBS[kind]
        given = [f"base={bases}/{family}", f"data.photos={photos}", *SETTINGS, *own, *json.loads(more)]
        try:
            train(load_recipe(preset, given), Path(out) / "runs" / name)
        except BadInput as error:
            return 2, str(error)
    return 0, ""


def everything(arguments: list[str]) -> tuple[int, str]:
    """arguments: a folder, the photos, the folder of the bases, and in JSON the cases and the jobs. The folder has
    a run of one process that goes on here."""
    from finetune.training.peers import joined

    out, photos, bases = arguments[:3]
    cases, names = json.loads(arguments[3])
    fits([f"{out}/2", bases, "shard", *cases])
    if joined().rank == 0:
        shutil.copytree(f"{out}/2/sd1-full", f"{out}/2 to 2/sd1-full")
        shutil.rmtree(f"{out}/2 to 2/sd1-full/checkpoints/step-000004")
    joined().wait()
    for way in ("1 to 2", "2 to 2"):
        fits([f"{out}/{way}", bases, "shard", "sd1-full"])
    return jobs([f"{out}/2", photos, bases, '["run.shard=true"]', *names])
