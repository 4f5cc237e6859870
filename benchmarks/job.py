"""Where the CPU-seconds of a whole job go, phase by phase, beside the job of a bare loop, the floor.

    python benchmarks/job.py                            # the demo: `finetune demo` with an empty cache
    python benchmarks/job.py --size 34M --steps 10      # a 34M UNet at 256 pixels, no pictures, and the floor's job
    python benchmarks/job.py --size sd15 --steps 10     # SD 1.5's size (4 GB on the disk, 8 GB of memory)

Every job runs in a process of its own, with one thread. Ours runs twice: with an empty cache, and once more with what
the first one has stored. The floor's job loads the same base, encodes the same photos and caption once, trains the
same adapter for the same number of steps, and saves it: no class images, pictures, checks or page. The process's
CPU-seconds are compared, because wall time means little on a shared machine. With --json FILE, each job's phases are
added to it as a line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory import peak_memory

if TYPE_CHECKING:
    from finetune.config.recipe import Recipe

SIZES = ("demo", "34M", "sd15")
RANK, BATCH, SIDE = 4, 2, 256  # of the jobs beside the floor
REST = "all else"


class Meter:
    """A consumer of events that adds up the process's CPU-seconds by phase; the innermost open phase pays.

    The loop's own seconds are those of "Training" less what is drawn and measured inside it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open: list[str] = []
        self.last = 0.0  # CPU-seconds of the process until the first event are paid by "imports"

    def __call__(self, event: Any) -> None:
        kind = type(event).__name__
        self.pay(self.open[-1] if self.open else REST)
        if kind == "PhaseStarted":
            self.open.append(event.title)
        if kind == "PhaseEnded":
            self.open.remove(event.title)

    def pay(self, title: str) -> None:
        now = time.process_time()
        self.seconds[title] += now - self.last
        self.last = now


def base_of(size: str, work: Path) -> str:
    from full_size import write_sd15
    from step import source_of

    if size != "sd15":
        return source_of("tiny" if size == "demo" else size, work)
    folder = work / size
    if not (folder / "model_index.json").is_file():
        write_sd15(folder)
    return str(folder)


def recipe_of(size: str, work: Path, steps: int, more: list[str] | None = None) -> Recipe:
    """The demo's recipe; for the others, a LoRA of its photos without class images and pictures."""
    from finetune import load_recipe
    from finetune.jobs.demo import demo_images

    common = [f"data.photos={demo_images()}", "data.class_noun=mug"]
    if size == "demo":
        return load_recipe("demo", [*common, *([f"run.steps={steps}"] if steps else []), *(more or [])])
    own = [
        f"base={base_of(size, work)}", f"data.resolution={SIDE}", "prior.kind=none", f"method.rank={RANK}",
        f"run.steps={steps}", f"run.batch_size={BATCH}", "run.precision=fp32", "run.name=job", "sample.prompts=[]",
        "run.gradient_checkpointing=false", "method.parts=[denoiser]", "optim.text_lr=null",
    ]  # fmt: skip
    return load_recipe("sd15-lora", [*common, *own, *(more or [])])


def our_job(size: str, work: Path, steps: int, more: list[str]) -> dict[str, float]:
    meter = Meter()
    from finetune.core.allocator import keep_freed_memory

    keep_freed_memory()  # as the command does
    from finetune import train

    recipe = recipe_of(size, work, steps, more)
    from finetune.core.determinism import threads_at_most
    from finetune.jobs.demo import run_demo  # noqa: F401  the command's imports

    meter.pay("imports")
    with threads_at_most(1):
        train(recipe, Path(tempfile.mkdtemp(dir=work)) / "run", lambda line: None, events=meter)
    meter.pay(REST)
    return dict(meter.seconds)


def floor_job(size: str, work: Path, steps: int) -> dict[str, float]:
    """Loads, encodes once, trains and saves, with the same family and adapter and nothing else."""
    meter = Meter()
    import torch
    from safetensors.torch import save_file

    from finetune.core.batch import Geometry
    from finetune.data.decoding import open_image
    from finetune.data.photos import scan
    from finetune.families.source import load_family
    from finetune.methods.lora import LoRA
    from finetune.objectives.schedule import Schedule

    torch.set_num_threads(1)
    recipe = recipe_of(size, work, steps)
    meter.pay("imports")
    family = load_family(recipe.base.source)
    schedule = family.schedule
    assert isinstance(schedule, Schedule), "the floor's loss is that of a base that predicts noise"
    meter.pay("Base")
    side, latents = SIDE, []
    with torch.no_grad():
        for photo in scan(recipe.data.photos):
            image = open_image(photo.path).resize((side, side))
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3)
            latents.append(family.codec.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).mean)
        cond = family.encode_prompts(["a photo of sks mug"] * BATCH)
    meter.pay("Latents")
    method = LoRA(rank=RANK)
    trained = method.attach(family, 0)
    family.parts.release(["vae", "text_encoder"])
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, fused=True)
    geometry = [Geometry((side, side), (0, 0), (side, side))] * BATCH
    meter.pay(REST)
    for step in range(steps):
        x0 = torch.cat([latents[(step * BATCH + n) % len(latents)] for n in range(BATCH)])
        noise, t = torch.randn_like(x0), torch.randint(0, schedule.steps, (BATCH,))
        alphas = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = alphas.sqrt() * x0 + (1 - alphas).sqrt() * noise
        (family.predict(noisy, t, cond, geometry).float() - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    meter.pay("Training")
    save_file(method.state_dict(family), work / "floor.safetensors")
    meter.pay("Export")
    return dict(meter.seconds)


def measured(job: str, arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Runs this program again for one job, in a process of its own."""
    command = [sys.executable, __file__, "--job", job, "--size", arguments.size, "--work", str(arguments.work)]
    command += ["--steps", str(arguments.steps), *arguments.overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FINETUNE_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(jobs: dict[str, dict[str, Any]]) -> None:
    titles = list(dict.fromkeys(title for job in jobs.values() for title in job["phases"]))
    print(f"{'CPU-seconds':24}" + "".join(f"{name:>10}" for name in jobs))
    for title in titles:
        print(f"{title:24}" + "".join(f"{job['phases'].get(title, 0):10.1f}" for job in jobs.values()))
    print(f"{'whole job':24}" + "".join(f"{job['seconds']:10.1f}" for job in jobs.values()))
    print(f"{'peak memory, MB':24}" + "".join(f"{job['peak'] / 1e6:10.0f}" for job in jobs.values()))


def one_job(arguments: argparse.Namespace) -> None:
    from finetune.core.logging import quiet, quiet_bars

    quiet()
    quiet_bars()
    what = arguments.size, arguments.work, arguments.steps
    phases = floor_job(*what) if arguments.job == "floor" else our_job(*what, arguments.overrides)
    print(json.dumps({"phases": phases, "seconds": time.process_time(), "peak": peak_memory()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--steps", type=int, default=0, help="default: the recipe's (demo) or 10")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "finetune-job")
    parser.add_argument("--json", type=Path, help="adds a line for each job to this file")
    parser.add_argument("--cold-only", action="store_true", help="leaves out the second run and the floor")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe of our jobs")
    arguments = parser.parse_args()
    if arguments.size != "demo":
        arguments.steps = arguments.steps or 10
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.job:
        one_job(arguments)
        return
    base_of(arguments.size, arguments.work)  # written here, so that no job pays for it
    with tempfile.TemporaryDirectory() as cache:
        wanted = ["cold"] if arguments.cold_only else ["cold", "warm"]
        wanted += [] if arguments.size == "demo" or arguments.cold_only else ["floor"]
        jobs = {}
        for name in wanted:
            jobs[name] = measured(name, arguments, Path(cache))
            if arguments.json:
                with arguments.json.open("a", encoding="utf-8", newline="\n") as file:
                    told = {"size": arguments.size, "steps": arguments.steps, "job": name} | jobs[name]
                    file.write(json.dumps(told) + "\n")
    show(jobs)


if __name__ == "__main__":
    main()
