"""Compares our training step with a bare loop, the floor, in one run: CPU-seconds per step, start-up, memory.

    OMP_WAIT_POLICY=passive python benchmarks/step.py            # the tiny base and a 34M UNet at 256 pixels
    python benchmarks/step.py --sizes 34M --fast on off --precision fp32 bf16 --out benchmarks/step.jsonl
    python benchmarks/step.py --table                            # the rows of benchmarks/step.jsonl

The floor uses the same model with the same adapter, and all inputs are tensors in memory. It runs forward, loss,
backward and fused AdamW in fp32, without data plan, caches, random draws, clipping, logs and checks. Our steps and the
floor's alternate, so that other load on the machine affects both; each has its own process, because the allocator's
settings of `run.fast` hold for a process. The medians of the processes' CPU-seconds are compared, because wall time
means little on a shared machine.
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

SIZES = {
    "tiny": "the embedded tiny base, 128 px",
    "34M": "a 34M UNet of SD1's shape, random weights, 256 px",
    "860M": "SD1.5's UNet with random weights, 256 px; about 12 GB of memory",
}
ROWS = Path(__file__).with_name("step.jsonl")
RANK, BATCH = 4, 2


def write_base(size: str, folder: Path) -> None:
    """Writes a diffusers folder with a four-level UNet like SD1's with 34M parameters, or of its size, and other small
    parts."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from finetune.testing.tiny_unets import tiny_scheduler, write_sd

    write_sd(folder, 0, linear_projection=False)
    torch.manual_seed(0)
    widths = (64, 128, 256, 256) if size == "34M" else (320, 640, 1280, 1280)
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
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
    scheduler: Any = tiny_scheduler("epsilon")
    scheduler.save_pretrained(folder / "scheduler")


def source_of(size: str, work: Path) -> str:
    if size == "tiny":
        return "tiny"
    folder = work / size
    if not (folder / "scheduler").is_dir():
        write_base(size, folder)
    return str(folder)


def make_photos(work: Path) -> Path:
    from PIL import Image

    folder = work / "photos"
    folder.mkdir(parents=True, exist_ok=True)
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
    channels = family.codec.channels
    noisy, target = torch.randn(BATCH, channels, side, side), torch.randn(BATCH, channels, side, side)
    timesteps = torch.tensor([300, 700])
    geometry = [Geometry((side, side), (0, 0), (side, side))] * BATCH

    def step() -> None:
        loss = (family.predict(noisy, timesteps, cond, geometry).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_run(
    source: str, work: Path, steps: int, on_step: Callable[[int], None], fast: str = "off", precision: str = "fp32"
) -> float:
    """Runs our loop with our data plan, as `finetune train` does. Returns the seconds for saving a checkpoint."""
    from finetune.config.load import parse_recipe
    from finetune.core.events import sent_to
    from finetune.jobs.fit import fit_job
    from finetune.jobs.prepare import prepare
    from finetune.runs.folder import RunFolder
    from finetune.runs.metrics import MetricsFile
    from finetune.training.accelerate import make_accelerator
    from finetune.training.checkpoint import Checkpoints, State

    Write = Callable[[Path, State], None]
    saving: list[float] = []

    class TimedCheckpoints(Checkpoints):
        def save(self, state: State, keep: int, write: Write | None = None) -> Path:
            began = time.perf_counter()
            path = super().save(state, keep, write)
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
            "run": {"steps": steps, "batch_size": BATCH, "checkpoint_every": 10**6}
            | {"fast": fast, "precision": precision, "verdicts": "off"},
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
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return call(*arguments, **named)
            finally:
                spent.append(time.process_time() - began)

        return run

    for owner, name in ((Readings, "rows"), (Trainer, "_report")):  # signals are asked about in the first
        setattr(owner, name, timed(getattr(owner, name)))
    return spent


class Floor:
    """The floor's steps in another process, one at a time."""

    def __init__(self, size: str, work: Path) -> None:
        command = [sys.executable, __file__, "--work", str(work), "--serve", "--sizes", size]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def step(self) -> float:
        """Runs one step. Returns its CPU-seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        while not line.startswith("seconds "):
            line = self.process.stdout.readline()
            assert line, "the floor's process ended"
        return float(line.split()[1])

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve_floor(size: str, work: Path) -> None:
    """Runs one step of the floor for each line of the input, and prints its CPU-seconds."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    step = floor_step(source_of(size, work))
    for _ in sys.stdin:
        began = time.process_time()
        step()
        print("seconds", time.process_time() - began, flush=True)


def side_by_side(size: str, work: Path, steps: int, fast: str, precision: str) -> dict[str, Any]:
    """Median CPU-seconds of our step and of the floor's, alternating."""
    import torch

    from finetune.core.allocator import keep_freed_memory

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if fast == "on":
        keep_freed_memory()  # as the command does
    source = source_of(size, work)
    floor = Floor(size, work)
    floor.step()
    ours_each, floor_each, mark = [], [], [0.0]

    def on_step(number: int) -> None:
        now = time.process_time()
        if number > 1:  # the first step includes start-up
            ours_each.append(now - mark[0])
        floor_each.append(floor.step())
        mark[0] = time.process_time()

    spent = timed_protection()
    saving = our_run(source, work, steps + 1, on_step, fast, precision)
    floor.end()
    ours, bare = statistics.median(ours_each), statistics.median(floor_each[1:])
    return {
        "size": size,
        "fast": fast,
        "precision": precision,
        "steps": steps,
        "ours": ours,
        "floor": bare,
        "ratio": ours / bare,
        "saving": saving,
        "protection": sum(spent) / (steps + 1) / ours,
        "peak_mb": peak_memory() / 2**20,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| base | precision | `run.fast` | ours | floor, fp32 | ratio | steps |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        numbers = f"{row['ours']:.3f} | {row['floor']:.3f} | {row['ratio']:.2f} | {row['steps']}"
        lines.append(f"| {row['size']} | {row['precision']} | `{row['fast']}` | {numbers} |")
    return "\n".join(lines)


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
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(row: dict[str, Any]) -> None:
    print(f"  run.fast {row['fast']}, {row['precision']}, {row['steps']} steps")
    print(f"  CPU-s per step: ours {row['ours']:.4f}, floor {row['floor']:.4f}, ratio {row['ratio']:.3f}", flush=True)
    print(f"  of which checks, signals and metrics: {row['protection']:.2%}", flush=True)
    print(f"  a checkpoint: {row['saving']:.3f} s, the time of {row['saving'] / row['ours']:.1f} steps", flush=True)


def show_start(size: str, work: Path) -> None:
    cold, warm, bare = child(size, work, "ours"), child(size, work, "ours"), child(size, work, "floor")
    print(
        f"  start to first step: ours {cold['first_step']:.1f} s, warm cache {warm['first_step']:.1f} s, floor "
        f"{bare['first_step']:.1f} s"
    )
    print(f"  peak memory: ours {warm['peak_mb']:.0f} MB, floor {bare['peak_mb']:.0f} MB", flush=True)


def measured(size: str, work: Path, steps: int, fast: str, precision: str) -> dict[str, Any]:
    """`side_by_side` in a new process."""
    command = [sys.executable, __file__, "--work", str(work), "--side", "--sizes", size, "--steps", str(steps)]
    command += ["--fast", fast, "--precision", precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "34M"], choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--fast", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, help="a file to which each row is added, as a line of JSON")
    parser.add_argument("--no-start", action="store_true", help="measure steps alone")
    parser.add_argument("--table", action="store_true", help="print the rows of step.jsonl as a table")
    parser.add_argument("--alone", choices=["ours", "floor"], help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    from finetune.core.logging import quiet

    quiet()
    asked = options()
    if asked.table:
        print(table([json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]))
        return
    work, size = asked.work or Path(tempfile.mkdtemp()), asked.sizes[0]
    os.environ.setdefault("FINETUNE_CACHE", str(work / "cache"))
    if asked.alone:
        print(json.dumps(alone(size, work, asked.alone)))
    elif asked.serve:
        serve_floor(size, work)
    elif asked.side:
        print(json.dumps(side_by_side(size, work, asked.steps, asked.fast[0], asked.precision[0])))
    else:
        compare(asked, work)


def compare(asked: argparse.Namespace, work: Path) -> None:
    for size in asked.sizes:
        print(f"{size}: {SIZES[size]}, LoRA rank {RANK}, {BATCH} images a step")
        for precision in asked.precision:
            for fast in asked.fast:
                row = measured(size, work, asked.steps, fast, precision)
                show(row)
                if asked.out:
                    with asked.out.open("a", encoding="utf-8", newline="\n") as file:
                        file.write(json.dumps(row) + "\n")
        if not asked.no_start:
            show_start(size, work)


if __name__ == "__main__":
    main()
