"""Kills a run at random moments, resumes it, and compares its result with that of a run that was never killed.

    python benchmarks/chaos.py --kills 60

It starts a small LoRA run with class images, caching, accumulation, dropout, EMA and frequent checkpoints in a
separate process, and kills it with SIGKILL at a random moment. This repeats until the run ends; then the next run
starts with empty caches. After one kill in five it also flips a byte of the newest checkpoint. The exit code is 0 if
every adapter has the same SHA-256, and every metrics.jsonl the same lines (except for times), as in the uninterrupted
run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {"lora": {"kind": "lora", "rank": 4, "dropout": 0.1}, "full": {"kind": "full"}}
WINDOW = 0.55  # share of the uninterrupted run's time: a resumed run with only images and exports left may then end
PHASES = ("before the first file", "class images", "latents and prompts", "training", "saving", "images and exports")


def recipe(work: Path, method: str, optim: str) -> Any:
    from PIL import Image

    from finetune.config.load import parse_recipe
    from finetune.testing.tiny import write_tiny

    base, photos = work / "base", work / "photos"
    if not base.is_dir():
        write_tiny("sd1", base)
        photos.mkdir()
        for number in range(4):
            Image.linear_gradient("L").rotate(90 * number).convert("RGB").save(photos / f"{number}.png")
    return parse_recipe(
        {
            "base": str(base),
            "data": {
                "photos": str(photos),
                "class_noun": "mug",
                "crop": "random",
                "flip": True,
                "caption_dropout": 0.1,
            },
            "prior": {"kind": "class_images", "count": 8, "steps": 4, "batch_size": 2},
            "method": METHODS[method] | {"parts": ["denoiser", "text_encoders"]},
            "optim": {"kind": optim, "lr": 1e-3, "schedule": "cosine", "warmup": 5},
            "run": {"steps": 60, "batch_size": 2, "accumulate": 2, "ema": 0.99, "checkpoint_every": 3, "keep": 3},
            "sample": {"count": 1, "steps": 2},
        }
    )


def work_on(work: Path, run: Path, kinds: tuple[str, str]) -> None:
    """The work of a child process: starts or resumes the training."""
    import torch

    from finetune.jobs.train import train

    torch.set_num_threads(1)
    os.environ["FINETUNE_CACHE"] = str(work / "caches" / run.name)
    noted = (work / "damaged.txt").open("a", encoding="utf-8", newline="\n")
    warnings.showwarning = lambda message, *rest: print(message, file=noted, flush=True)
    warnings.simplefilter("always", UserWarning)
    train(recipe(work, *kinds), run)


def phase_of(work: Path, run: Path) -> str:
    """The phase that a killed run had reached, from its files."""
    cache = work / "caches" / run.name
    if any((run / "checkpoints").glob(".*.tmp")):
        return "saving"
    if (run / "adapter" / "trained.safetensors").is_file():
        return "images and exports"
    if (run / "metrics.jsonl").is_file():
        return "training"
    if len(list(cache.rglob("class-images/*/*.png"))) == 8:
        return "latents and prompts"
    return "class images" if run.is_dir() else "before the first file"


def flip_a_byte(run: Path, dice: random.Random) -> bool:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1:]
    if not newest:
        return False
    file = dice.choice(sorted(newest[0].glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    file.write_bytes(data)
    return True


def outcome(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """The adapter's hash, and the metrics without their timing."""
    from finetune.core.files import sha256

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        del row["seconds"]
    return sha256(run / "adapter" / "trained.safetensors"), rows


def kill_once(
    context: Any, work: Path, run: Path, kinds: tuple[str, str], longest: float, dice: random.Random
) -> bool:
    """Starts or resumes the run and kills it at a random moment. Returns False if the run ended before that."""
    process = context.Process(target=work_on, args=(work, run, kinds))
    process.start()
    process.join(dice.uniform(0, longest))
    ended = process.exitcode is not None
    if ended and process.exitcode != 0:
        sys.exit(f"a resumed run failed with exit code {process.exitcode}: {run}")
    process.kill()
    process.join()
    return not ended


def main() -> None:
    from finetune.core.logging import quiet

    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--method", choices=list(METHODS), default="lora")
    parser.add_argument("--optim", choices=["adamw", "adamw8bit"], default="adamw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="chaos-"))
    work.mkdir(parents=True, exist_ok=True)
    import finetune.jobs.train  # noqa: F401 - once, so that every child starts with everything imported
    from finetune.families.registry import FAMILIES
    from finetune.methods.registry import METHODS as REGISTERED

    assert list(FAMILIES)  # registries import their modules on first use
    assert list(REGISTERED)

    kinds = (arguments.method, arguments.optim)
    dice, context = random.Random(arguments.seed), multiprocessing.get_context("fork")
    recipe(work, *kinds)
    began = time.monotonic()
    unbroken = context.Process(target=work_on, args=(work, work / "unbroken", kinds))
    unbroken.start()
    unbroken.join()
    length = time.monotonic() - began
    wanted = outcome(work / "unbroken")
    kills, flipped, runs, same, where = 0, 0, 0, 0, Counter[str]()
    while kills < arguments.kills:
        run = work / f"run-{runs}"
        runs += 1
        while kill_once(context, work, run, kinds, length * WINDOW if kills < arguments.kills else 10 * length, dice):
            kills += 1
            where[phase_of(work, run)] += 1
            flipped += dice.random() < 0.2 and flip_a_byte(run, dice)
        same += outcome(run) == wanted
    damaged = (work / "damaged.txt").read_text(encoding="utf-8").count("is damaged")
    print(f"uninterrupted run: {length:.1f} s, adapter {wanted[0][:16]}")
    print(f"{kills} kills: " + ", ".join(f"{where[name]} in {name}" for name in PHASES if where[name]))
    print(f"{flipped} checkpoints damaged on purpose; runs found, reported and skipped a damaged one {damaged} times")
    print(f"{runs} runs completed, {same} with the uninterrupted run's adapter (SHA-256) and metrics")
    sys.exit(0 if same == runs else 1)


if __name__ == "__main__":
    main()
