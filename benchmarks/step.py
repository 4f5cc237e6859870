"""Compares our training step with a bare loop, the floor, in one run: CPU-seconds per step, start-up, memory.

    OMP_WAIT_POLICY=passive python benchmarks/step.py            # the tiny base and a 34M UNet at 256 pixels

The floor uses the same model with the same adapter, and all inputs are tensors in memory. It runs forward, loss,
backward and fused AdamW, without data plan, caches, random draws, clipping, logs and checks. Our steps and the floor's
alternate in one process, so that other load on the machine affects both. The medians of the process's CPU-seconds are
compared, because wall time means little on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import peak_memory

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
BEGAN = time.perf_counter()

SIZES = {"tiny": "the embedded tiny base, 64 px", "34M": "a 34M UNet of SD1's shape, random weights, 256 px"}
RANK, BATCH = 4, 2


def write_34m(folder: Path) -> None:
    """Writes a diffusers folder with a four-level UNet like SD1's with 34M parameters, and other small parts."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from finetune.testing.tiny_unets import tiny_scheduler, write_sd

    write_sd(folder, 0, linear_projection=False)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=256,
    )
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    tiny_scheduler("epsilon").save_pretrained(folder / "scheduler")


def source_of(size: str, work: Path) -> str:
    if size == "tiny":
        return "tiny"
    folder = work / size
    if not (folder / "unet").is_dir():
        write_34m(folder)
    return str(folder)


def make_photos(work: Path) -> Path:
    from PIL import Image

    folder = work / "photos"
    folder.mkdir(exist_ok=True)
    for number in range(4):
        Image.linear_gradient("L").rotate(90 * number).convert("RGB").save(folder / f"{number}.png")
    return folder


def floor_step(source: str) -> Callable[[], None]:
    """A function for one step of the bare loop, whose inputs are tensors in memory."""
    import torch

    from finetune.core.batch import Geometry
    from finetune.families.source import load_family
    from finetune.methods.lora import LoRA

    family = load_family(source)
    trained = list(LoRA(rank=RANK).attach(family, 0).values())
    family.parts["denoiser"].train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    with torch.no_grad():
        cond = family.encode_prompts(["a photo of a mug"] * BATCH)
    side = family.resolution // family.codec.factor
    channels = family.parts["denoiser"].config.in_channels
    noisy, target = torch.randn(BATCH, channels, side, side), torch.randn(BATCH, channels, side, side)
    timesteps = torch.tensor([300, 700])
    geometry = [Geometry((side, side), (0, 0), (side, side))] * BATCH

    def step() -> None:
        loss = (family.predict(noisy, timesteps, cond, geometry).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_run(source: str, work: Path, steps: int, on_step: Callable[[int], None]) -> float:
    """Runs our loop with our data plan, as `finetune train` does. Returns the seconds for saving a checkpoint."""
    from finetune.config.load import parse_recipe
    from finetune.core.events import sent_to
    from finetune.jobs.fit import fit_job
    from finetune.jobs.prepare import prepare
    from finetune.runs.folder import RunFolder
    from finetune.runs.metrics import MetricsFile
    from finetune.training.accelerate import make_accelerator
    from finetune.training.checkpoint import Checkpoints, State

    saving: list[float] = []

    class TimedCheckpoints(Checkpoints):
        def save(self, state: State, keep: int) -> Path:
            began = time.perf_counter()
            path = super().save(state, keep)
            saving.append(time.perf_counter() - began)
            return path

    class Timed(RunFolder):
        @property
        def checkpoints(self) -> Checkpoints:
            return TimedCheckpoints(self.path)

    recipe = parse_recipe(
        {
            "base": source,
            "data": {"photos": str(make_photos(work)), "class_noun": "mug", "token": "sks", "flip": True},
            "method": {"kind": "lora", "rank": RANK},
            "optim": {"kind": "adamw"},
            "run": {"steps": steps, "batch_size": BATCH, "checkpoint_every": 10**6},
            "sample": {"prompts": ["a mug"], "count": 1, "steps": 1},
        }
    )
    with tempfile.TemporaryDirectory(dir=work) as run:
        folder = Timed(Path(run) / "run")
        with folder.held(recipe), sent_to(MetricsFile(folder.path)):
            fit_job(prepare(recipe), folder, make_accelerator(recipe.run, adapter=True), on_step)
    return saving[-1]


def timed_protection() -> list[float]:
    """Makes the loop's checks, its check for signals and its metrics record their CPU-seconds. Returns that list."""
    from finetune.training.readings import Readings
    from finetune.training.trainer import Trainer

    spent: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = time.process_time()
            try:
                return call(*arguments)
            finally:
                spent.append(time.process_time() - began)

        return run

    for owner, name in ((Readings, "rows"), (Trainer, "_report")):  # signals are asked about in the first
        setattr(owner, name, timed(getattr(owner, name)))
    return spent


def side_by_side(size: str, work: Path, steps: int) -> dict[str, Any]:
    """Median CPU-seconds of our step and of the floor's, alternating."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    source = source_of(size, work)
    floor = floor_step(source)
    floor()
    ours_each, floor_each, mark = [], [], [0.0]

    def on_step(number: int) -> None:
        now = time.process_time()
        if number > 1:  # the first step includes start-up
            ours_each.append(now - mark[0])
        began = time.process_time()
        floor()
        floor_each.append(time.process_time() - began)
        mark[0] = time.process_time()

    spent = timed_protection()
    saving = our_run(source, work, steps + 1, on_step)
    ours, bare = statistics.median(ours_each), statistics.median(floor_each[1:])
    return {
        "ours": ours,
        "floor": bare,
        "ratio": ours / bare,
        "saving": saving,
        "protection": sum(spent) / (steps + 1) / ours,
    }


def alone(size: str, work: Path, which: str) -> dict[str, float]:
    """Runs five steps in a new process: seconds from its start to the end of the first step, and peak memory."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    first: list[float] = []

    def note(number: int = 1) -> None:
        first.append(time.perf_counter() - BEGAN)

    source = source_of(size, work)
    if which == "floor":
        step = floor_step(source)
        for _ in range(5):
            step()
            note()
    else:
        our_run(source, work, 5, note)
    return {"first_step": first[0], "peak_mb": peak_memory() / 2**20}


def child(size: str, work: Path, which: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", str(work), "--alone", which, "--sizes", size]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    from finetune.core.logging import quiet

    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--alone", choices=["ours", "floor"])
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    os.environ.setdefault("FINETUNE_CACHE", str(work / "cache"))
    if arguments.alone:
        print(json.dumps(alone(arguments.sizes[0], work, arguments.alone)))
        return
    for size in arguments.sizes:
        row = side_by_side(size, work, arguments.steps)
        print(f"{size}: {SIZES[size]}, LoRA rank {RANK}, {BATCH} images a step, {arguments.steps} steps")
        print(
            f"  CPU-s per step: ours {row['ours']:.4f}, floor {row['floor']:.4f}, ratio {row['ratio']:.3f}", flush=True
        )
        print(f"  of which checks, signals and metrics: {row['protection']:.2%}", flush=True)
        print(
            f"  a checkpoint: {row['saving']:.3f} s, the time of {row['saving'] / row['ours']:.1f} steps", flush=True
        )
        cold, warm, bare = child(size, work, "ours"), child(size, work, "ours"), child(size, work, "floor")
        print(
            f"  start to first step: ours {cold['first_step']:.1f} s, warm cache {warm['first_step']:.1f} s, floor "
            f"{bare['first_step']:.1f} s"
        )
        print(f"  peak memory: ours {warm['peak_mb']:.0f} MB, floor {bare['peak_mb']:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
