"""How a run grows with its pictures: seconds and peak memory of scan, cold cache, warm start and steps.

    OMP_NUM_THREADS=1 python benchmarks/growth.py                      # 1,000 and 10,000 made pictures, tiny base
    OMP_NUM_THREADS=1 python benchmarks/growth.py --counts 1000 10000 100000           # a quarter of an hour
    OMP_NUM_THREADS=1 python benchmarks/growth.py --counts 100000 --cached-only
    python benchmarks/growth.py --table                                # the newest rows of growth.jsonl

The pictures are JPEGs in parquet files, with 1,000 different captions. Each part runs in a process of its own, so that
its peak is its own. "growth" is what is above the peak after the imports and the base; "own growth" leaves out the
pages of mapped files, which the system takes back when it needs them. `--cached-only` makes the latents up instead of
encoding them, and scans without decoding: the parts "warm" and "steps" are as they would be.

"before" encodes a hundred pictures as version 0.1 did: one after another in one thread, one file and one fsync each.
Every part's result is added to benchmarks/growth.jsonl. "waited_s" is how long its threads stood in the queue for a
core: on a free machine it is 0.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from memory import OwnPeak, own_memory, peak_memory

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

SIDE, DRAWN, CAPTIONS, SHARD, BEFORE, STEPS = 96, 1000, 1000, 2000, 100, 40
COLOURS = ("red", "green", "blue", "white")


def make_pictures(folder: Path, count: int) -> Path:
    """Writes parquet files of `SHARD` rows each, if they are not there. After `DRAWN` pictures they look the same
    again, but no two are equal: a number follows the picture."""
    import numpy as np
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[int, bytes] = {}
    for start in range(0, count, SHARD):
        file = folder / f"train-{start // SHARD:05d}.parquet"
        if file.is_file():
            continue
        images, texts = [], []
        for number in range(start, min(start + SHARD, count)):
            if number % DRAWN not in drawn:
                grid = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
                held = io.BytesIO()
                Image.fromarray(grid).resize((SIDE, SIDE + number % 3), Image.Resampling.BICUBIC).save(held, "JPEG")
                drawn[number % DRAWN] = held.getvalue()
            images.append({"bytes": drawn[number % DRAWN] + str(number).encode(), "path": None})
            texts.append(f"a {COLOURS[number % 4]} {{token}} {{noun}} on plate {number % CAPTIONS}")
        parquet.write_table(pyarrow.table({"image": images, "text": texts}), file)
    return folder


def recipe_of(pictures: Path, workers: int | None, steps: int = STEPS) -> Any:
    from finetune.config.load import parse_recipe

    return parse_recipe(
        {
            "base": "tiny",
            "data": {"photos": str(pictures), "class_noun": "mug", "token": "sks", "workers": workers},
            "method": {"kind": "lora", "rank": 4},
            "optim": {"kind": "adamw"},
            "prior": {"kind": "none"},
            "run": {"steps": steps, "batch_size": 2, "checkpoint_every": 10**6, "verdicts": "off"},
            "sample": {"prompts": ["a mug"], "count": 1, "steps": 1},
        }
    )


def imports() -> dict[str, Any]:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch

    from finetune.families.source import load_family
    from finetune.jobs import fit, prepare  # noqa: F401

    torch.set_num_threads(1)
    load_family("tiny")
    return {}


def scan(pictures: Path, workers: int | None) -> dict[str, Any]:
    from finetune.jobs.subjects import scan_subjects

    (found,) = scan_subjects(recipe_of(pictures, workers).data)
    return {"photos": len(found.photos)}


def cold(pictures: Path, workers: int | None) -> dict[str, Any]:
    """The scan is there; latents and prompts are not."""
    from finetune.jobs.dataset import cache_latents, make_prompt_encoder, make_streams
    from finetune.jobs.prepare import prepare

    job = prepare(recipe_of(pictures, workers))
    streams = make_streams(job)
    began = time.perf_counter(), time.process_time()
    cache_latents(job, streams)
    latents = time.perf_counter() - began[0], time.process_time() - began[1]
    make_prompt_encoder(job, streams)
    return {"latents_s": latents[0], "latents_cpu_s": latents[1]}


def before(pictures: Path, workers: int | None) -> dict[str, Any]:
    """The first pictures as version 0.1 cached them; the seconds are for each 1,000."""
    import torch

    from finetune.core.files import cache_dir
    from finetune.data.entries import save_entry
    from finetune.jobs.dataset import make_streams
    from finetune.jobs.prepare import prepare

    torch.set_num_threads(1)
    job = prepare(recipe_of(pictures, workers))
    crops = [sample.crops[0] for sample in make_streams(job)[0]][:BEFORE]
    job.family.parts.place(list(job.family.codec.parts))
    began = time.perf_counter(), time.process_time()
    for crop in crops:
        encoded = job.family.codec.encode(crop.pixels()[None])
        save_entry(cache_dir() / "before", crop.key, {"mean": encoded.mean[0], "std": encoded.std[0]})
    scale = 1000 / len(crops)
    return {
        "s_of_1000": scale * (time.perf_counter() - began[0]),
        "cpu_s_of_1000": scale * (time.process_time() - began[1]),
    }


def _from_header(file: Path, content: bytes, stored: Any = None) -> Any:
    import hashlib

    from PIL import Image

    from finetune.data.photos import Photo

    with Image.open(io.BytesIO(content)) as image:
        return Photo(file, image.size, hashlib.sha256(content).hexdigest(), stored=stored)


def make_up(pictures: Path, workers: int | None) -> dict[str, Any]:
    """Entries of random latents where the real ones would be, and a scan of the pictures' headers alone."""
    import torch

    from finetune.core.files import cache_dir
    from finetune.data import tables
    from finetune.data.cache import LatentCache
    from finetune.jobs.dataset import cache_options, encoding_dtype, make_prompt_encoder, make_streams
    from finetune.jobs.prepare import prepare

    with patch.object(tables, "photo_of", _from_header):
        job = prepare(recipe_of(pictures, workers))
    codec = job.family.codec
    side = job.resolution // codec.factor
    cache = LatentCache(cache_dir(), job.base_hash, encoding_dtype(job.family), cache_options(job))
    made = torch.Generator().manual_seed(0)
    streams = make_streams(job)
    for sample in streams[0]:
        mean = torch.randn(codec.channels, side, side, generator=made)
        cache.shards.add(sample.crops[0].key, {"mean": mean, "std": mean.abs()})
    cache.shards.flush()
    make_prompt_encoder(job, streams)
    return {}


def warm(pictures: Path, workers: int | None) -> dict[str, Any]:
    """From the recipe to the first batch, with everything in the caches."""
    from finetune.jobs.dataset import cache_latents, make_batches, make_prompt_encoder, make_streams
    from finetune.jobs.prepare import prepare

    job = prepare(recipe_of(pictures, workers))
    streams = make_streams(job)
    cache = cache_latents(job, streams)
    encode = make_prompt_encoder(job, streams)
    batch = make_batches(job, streams, cache).micro(0, 0)
    encode(batch.prompts, None)
    return {}


def steps(pictures: Path, workers: int | None) -> dict[str, Any]:
    """A warm run's steps, and how much of one is its data."""
    import statistics
    import tempfile

    from finetune.data.batches import Batches
    from finetune.jobs.fit import fit_job
    from finetune.jobs.prepare import prepare
    from finetune.runs.folder import RunFolder
    from finetune.training.accelerate import make_accelerator

    data: list[float] = []
    marks: list[float] = []
    micro = Batches.micro

    def timed(self: Batches, step: int, index: int) -> Any:
        began = time.process_time()
        batch = micro(self, step, index)
        data.append(time.process_time() - began)
        return batch

    Batches.micro = timed  # type: ignore[method-assign]
    recipe = recipe_of(pictures, workers)
    with tempfile.TemporaryDirectory() as run:
        folder = RunFolder(Path(run) / "run")
        with folder.held(recipe):
            fit_job(
                prepare(recipe),
                folder,
                make_accelerator(recipe.run, adapter=True),
                lambda step: marks.append(time.process_time()),
            )
    each = [1000 * (after - at) for at, after in pairwise(marks)]
    return {"step_cpu_ms": statistics.median(each), "data_cpu_ms": 1000 * statistics.median(data)}


PARTS: dict[str, Callable[[Path, int | None], dict[str, Any]]] = {
    "scan": scan, "before": before, "cold": cold, "warm": warm, "steps": steps, "make_up": make_up,
}  # fmt: skip


GROWN = ("growth_mb", "own_growth_mb")
TITLES = {
    "scan": "scan",
    "before": "latents as in version 0.1, from the first hundred: one after another, a file each",
    "cold": "latents, in two threads and shards",
    "warm": "start with full caches, to the first batch",
    "steps": "40 steps of two pictures",
    "make_up": "made-up latents",
}


def measured(part: str, count: int, work: Path, workers: int | None) -> dict[str, Any]:
    """The result of one part, in its own process."""
    command = [sys.executable, __file__, "--part", part, "--counts", str(count), "--work", str(work)]
    if workers:
        command += ["--workers", str(workers)]
    environment = os.environ | {
        "FINETUNE_CACHE": str(work / f"cache-{count}"),
        "HF_HOME": str(work / "hf"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{part} of {count:,} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def waited() -> float:
    """Seconds that the threads of this process, which still live, have waited for a core; 0 where nothing tells it."""
    tasks = Path("/proc/self/task")
    files = [task / "schedstat" for task in tasks.iterdir()] if tasks.is_dir() else []
    return sum(int(file.read_text(encoding="utf-8").split()[1]) for file in files if file.is_file()) / 1e9


def run_part(part: str, count: int, work: Path, workers: int | None) -> None:
    pictures = work / f"pictures-{count}"
    imports()
    base, own, stood = peak_memory(), own_memory(), waited()
    began = time.perf_counter(), time.process_time()
    with OwnPeak() as memory:
        found = PARTS[part](pictures, workers) if part in PARTS else {}
    found |= {
        "s": time.perf_counter() - began[0],
        "cpu_s": time.process_time() - began[1],
        "waited_s": waited() - stood,
        "peak_mb": peak_memory() / 1e6,
        "growth_mb": (peak_memory() - base) / 1e6,
        "own_growth_mb": (memory.peak - own) / 1e6,
    }
    print(json.dumps(found))


def table(rows_file: Path) -> str:
    """The newest row of each part and number of pictures."""
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    newest = {(row["pictures"], row["part"]): row for row in rows}
    lines = ["| pictures | part | seconds | CPU-seconds | growth | own growth |", "|---|---|---|---|---|---|"]
    for (count, part), row in sorted(newest.items(), key=lambda item: (list(PARTS).index(item[0][1]), item[0][0])):
        seconds, cpu = (row.get(name, row[short]) for name, short in (("latents_s", "s"), ("latents_cpu_s", "cpu_s")))
        if part == "before":
            seconds, cpu = (row[name] * count / 1000 for name in ("s_of_1000", "cpu_s_of_1000"))
        if part == "steps":
            cpu = f"{row['step_cpu_ms'] / 1000:.4f} a step, its data {row['data_cpu_ms'] / 1000:.4f}"
        grown = [f"{row[name]:,.0f} MB" if name in row and part != "before" else "" for name in GROWN]
        told = [seconds if part != "steps" else "", cpu]
        cells = [f"{value:,.{2 * (value < 10)}f}" if isinstance(value, float) else value for value in told]
        lines.append(f"| {count:,} | {TITLES[part]} | {' | '.join([*cells, *grown])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--work", type=Path, default=Path("/tmp/finetune-growth"))
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--cached-only", action="store_true")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--part")
    asked = parser.parse_args()
    if asked.table:
        print(table(asked.out))
        return
    if asked.part:
        run_part(asked.part, asked.counts[0], asked.work, asked.workers)
        return
    for count in asked.counts:
        shutil.rmtree(asked.work / f"cache-{count}", ignore_errors=True)
        make_pictures(asked.work / f"pictures-{count}", count)
        parts = ["make_up", "warm", "steps"] if asked.cached_only else list(PARTS)[:-1]
        for part in parts:
            found = measured(part, count, asked.work, asked.workers)
            print(f"{count:>7,} {part:>8}  " + "  ".join(f"{k} {v:,.2f}" for k, v in found.items()), flush=True)
            rounded = {name: round(value, 3) for name, value in found.items()}
            told = {"pictures": count, "part": part, "workers": asked.workers, **rounded}
            with asked.out.open("a", encoding="utf-8", newline="\n") as opened:
                opened.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
