"""The same work by us, by diffusers' script and by kohya's: CPU-seconds of a step and of a whole job, side by side.

    python benchmarks/peers.py --diffusers DIFFUSERS/examples/dreambooth/train_dreambooth_lora.py --kohya SD_SCRIPTS
    python benchmarks/peers.py --diffusers SCRIPT --size sd15 --python PEER_ENVIRONMENT/bin/python

The sources of the peers are not part of this package: whoever has them gives their places, and what is not given is
left out. The work: a LoRA of rank 4 on the UNet alone, five photos, 256 pixels, batches of two, fp32, AdamW, one
thread, random weights; no class images and no pictures. Kohya's script keeps the latents, as ours does; diffusers'
script encodes them in every step and has no other way. Each trains for a short and for a long run, in turn, each in a
process of its own; a step is the difference by its steps, so that loading and saving do not count in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from job import BATCH, RANK, SIDE, base_of

PROMPT = "a photo of sks mug"
RATE = "1e-4"
Command = Callable[[int, Path], list[str]]  # steps, an empty folder -> the command


@dataclass(frozen=True)
class Job:
    """What all train: a base's folder and a folder of photos."""

    base: str
    photos: Path


@dataclass(frozen=True)
class Cost:
    """Of one process: CPU-seconds, and peak memory in bytes."""

    seconds: float
    peak: float


def ours(job: Job) -> Command:
    def command(steps: int, folder: Path) -> list[str]:
        settings = [
            f"base={job.base}", f"data.photos={job.photos}", "data.class_noun=mug", "data.token=sks",
            f"data.resolution={SIDE}", "prior.kind=none", f"method.rank={RANK}", "method.parts=[denoiser]",
            "optim.kind=adamw", f"optim.lr={RATE}", "optim.text_lr=null", "optim.schedule=constant", "optim.warmup=0",
            f"run.steps={steps}", f"run.batch_size={BATCH}", "run.precision=fp32", "run.gradient_checkpointing=false",
            "run.verdicts=off", "sample.prompts=[]", f"run.dir={folder / 'run'}",
        ]  # fmt: skip
        return [sys.executable, "-m", "finetune", "train", "sd15-lora", *settings]

    return command


def diffusers(job: Job, script: Path, python: str) -> Command:
    def command(steps: int, folder: Path) -> list[str]:
        given = {
            "pretrained_model_name_or_path": job.base, "instance_data_dir": job.photos, "instance_prompt": PROMPT,
            "output_dir": folder, "resolution": SIDE, "train_batch_size": BATCH, "rank": RANK,
            "max_train_steps": steps, "learning_rate": RATE, "lr_warmup_steps": 0, "checkpointing_steps": 10**6,
            "mixed_precision": "no", "seed": 0,
        }  # fmt: skip
        return [python, str(script), *flags(given), "--pre_compute_text_embeddings"]

    return command


def kohya(job: Job, sources: Path, python: str) -> Command:
    def command(steps: int, folder: Path) -> list[str]:
        photos = folder / "photos" / "1_sks mug"  # repeats and caption, as kohya reads them
        shutil.copytree(job.photos, photos)
        given = {
            "pretrained_model_name_or_path": job.base, "train_data_dir": photos.parent, "output_dir": folder,
            "output_name": "peer", "save_model_as": "safetensors", "network_module": "networks.lora",
            "network_dim": RANK, "network_alpha": RANK, "resolution": SIDE, "train_batch_size": BATCH,
            "max_train_steps": steps, "learning_rate": RATE, "optimizer_type": "AdamW", "mixed_precision": "no",
            "max_data_loader_n_workers": 0, "seed": 0,
        }  # fmt: skip
        return [
            python,
            str(sources / "train_network.py"),
            *flags(given),
            "--cache_latents",
            "--network_train_unet_only",
        ]

    return command


def flags(given: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in given.items()]


def cost_of(command: Sequence[str], log: Path) -> Cost:
    """Runs a process to its end, with one thread. It and all that it waited for are counted.

    Raises:
        SystemExit: it failed; the end of what it said is shown.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w", encoding="utf-8", newline="\n") as out:
        where = [(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, out.fileno(), 2)]
        process = os.posix_spawnp(command[0], list(command), environment, file_actions=where)
        _, status, used = os.wait4(process, 0)
    if status:
        sys.exit(f"{' '.join(command)}\nfailed: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}")
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def measure(trainers: dict[str, Command], steps: tuple[int, int], rounds: int, work: Path) -> dict[str, list[float]]:
    """Seconds of a step, of the short job, and peak memory in MB, each the median over the rounds."""
    found: dict[str, list[list[float]]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, command in trainers.items():
            short, long = (one_job(command, count, work) for count in steps)
            a_step = (long.seconds - short.seconds) / (steps[1] - steps[0])
            found[name].append([a_step, short.seconds, long.peak / 1e6])
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}


def one_job(command: Command, steps: int, work: Path) -> Cost:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        os.environ["FINETUNE_CACHE"] = str(Path(folder) / "cache")  # nothing is left by an earlier job
        inner = Path(folder) / "out"
        inner.mkdir()
        return cost_of(command(steps, inner), Path(folder) / "log.txt")


def table(found: dict[str, list[float]], short: int) -> str:
    heads = ("", "a step, CPU-s", "ours / it", f"job of {short} steps, CPU-s", "ours / it", "peak memory, MB")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    own = found["ours"]
    for name, (a_step, job, peak) in found.items():
        lines.append(
            f"| {name} | {a_step:.3f} | {own[0] / a_step:.2f} | {job:.1f} | {own[1] / job:.2f} | {peak:.0f} |"
        )
    return "\n".join(lines)


def trainers_of(arguments: argparse.Namespace, job: Job) -> dict[str, Command]:
    """Ours and those of the peers whose sources were given."""
    found = {"ours": ours(job)}
    if arguments.diffusers:
        found["diffusers"] = diffusers(job, arguments.diffusers.resolve(), arguments.python)
    if arguments.kohya:
        found["kohya"] = kohya(job, arguments.kohya.resolve(), arguments.python)
    for name in ("diffusers", "kohya"):
        if name not in found:
            print(f"{name} is left out: --{name} says where its sources are", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, metavar="SCRIPT", help="train_dreambooth_lora.py")
    parser.add_argument("--kohya", type=Path, metavar="DIR", help="the folder of sd-scripts")
    parser.add_argument("--python", default=sys.executable, help="of the environment in which the peers run")
    parser.add_argument("--size", choices=("34M", "sd15"), default="34M")
    parser.add_argument("--steps", type=int, nargs=2, default=(10, 30), metavar=("SHORT", "LONG"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "finetune-peers")
    parser.add_argument("--json", type=Path, help="adds a line to this file")
    arguments = parser.parse_args()
    for given, wanted in ((arguments.diffusers, Path.is_file), (arguments.kohya, Path.is_dir)):
        if given and not wanted(given):
            parser.error(f"{given} is not there")
    if arguments.steps[1] <= arguments.steps[0]:
        parser.error("--steps: the second number must be larger than the first one")
    from finetune.jobs.demo import demo_images

    arguments.work.mkdir(parents=True, exist_ok=True)
    job = Job(base_of(arguments.size, arguments.work), demo_images())
    found = measure(trainers_of(arguments, job), tuple(arguments.steps), arguments.rounds, arguments.work)
    print(table(found, arguments.steps[0]))
    if arguments.json:
        with arguments.json.open("a", encoding="utf-8", newline="\n") as file:
            row = {"size": arguments.size, "steps": arguments.steps, "rounds": arguments.rounds, "found": found}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
