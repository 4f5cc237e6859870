"""What started processes do with sharded weights: the trainer on batches from memory, case by case."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from finetune.methods.full import Full
from finetune.methods.lora import LoRA

BOTH: list[Any] = ["denoiser", "text_encoders"]
LORA = {"rank": 4, "dropout": 0.1, "parts": BOTH}
CASES: dict[str, dict[str, Any]] = {
    "sd1-lora": {"method": LoRA(**LORA), "ema": 0.9, "accumulate": 2},
    "sd1-full": {"method": Full(parts=BOTH), "ema": 0.9, "accumulate": 2},
    "sdxl-lora": {"method": LoRA(**LORA)},
    "flux-lora": {"method": LoRA(**LORA)},
    "flux-full": {"method": Full()},
    "sd1-8bit": {"method": Full()},
    "sd1-lion8bit": {"method": Full()},
    "sd1-schedule_free": {"method": LoRA(**LORA)},
}


def fits(arguments: list[str]) -> tuple[int, str]:
    """arguments: a folder, the folder of the bases, "shard" or "whole", the steps, and the names of cases."""
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "training")]
    import torch
    from test_trainer import Memory, run_fit

    from finetune.optim.adamw8bit import AdamW8bit
    from finetune.optim.lion8bit import Lion8bit
    from finetune.optim.schedule_free import ScheduleFree

    torch.set_num_threads(1)
    optimisers = {"8bit": AdamW8bit(lr=1e-3), "lion8bit": Lion8bit(lr=1e-4), "schedule_free": ScheduleFree(lr=1e-3)}
    out, bases, how, steps, *names = arguments
    for name in names:
        family, _, kind = name.partition("-")
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        case = dict(CASES[name])
        folder = Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        channels = 16 if family == "flux" else 4
        batches = Memory(4, case.get("accumulate", 1), rank, world, channels=channels)
        run_fit(
            Path(bases) / family, folder, case.pop("method"), batches=batches, steps=int(steps), shard=how == "shard",
            optim=optimisers.get(kind), **case,
        )  # fmt: skip
    return 0, json.dumps({})
