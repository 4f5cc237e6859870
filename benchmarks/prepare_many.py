"""Time and peak memory of `finetune data check`, `dedupe` and `convert` with many made images.

    OMP_NUM_THREADS=1 nice -n 19 python benchmarks/prepare_many.py                # 10,000 images, 320x256
    python benchmarks/prepare_many.py --count 1000 --work /tmp/some-folder
    python benchmarks/prepare_many.py --count 100000 --side 64 --only dedupe      # minutes, 400 MB

The images are JPEGs with captions in metadata.jsonl; each hundredth is a copy of another, saved again. Each command
runs in a process of its own, so that its peak is its own. CPU time is told beside the time on the clock, since the
first does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from memory import peak_memory

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

COPIED = 100  # each hundredth image is a copy
PARTS = {
    "imports": [],
    "check": ["check", "{images}"],
    "dedupe": ["dedupe", "{images}", "{out}"],
    "convert to parquet": ["convert", "{images}", "{out}", "--to", "parquet"],
    "convert from parquet": ["convert", "{parquet}", "{out}", "--to", "jsonl"],
    "convert to webdataset": ["convert", "{images}", "{out}", "--to", "webdataset"],
}


def make_images(folder: Path, count: int, side: int) -> None:
    """Writes the images and metadata.jsonl, if they are not there."""
    import numpy as np
    from PIL import Image

    if (folder / "metadata.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        of = number - 1 if number % COPIED == COPIED - 1 else number
        drawn = np.random.default_rng(of)
        image = Image.fromarray(drawn.integers(0, 255, (9, 9, 3), dtype=np.uint8))
        image = image.resize((side * 5 // 4, side), Image.Resampling.BICUBIC)  # of a square one check asks less
        fine = Image.fromarray(drawn.integers(0, 255, (side, side * 5 // 4, 3), dtype=np.uint8))
        Image.blend(image, fine, 0.1).save(folder / f"{number:06d}.jpg", quality=90 if of == number else 80)
        lines.append(json.dumps({"file_name": f"{number:06d}.jpg", "text": f"sks, plate {of}, tag {of % 7}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def measured(part: str, work: Path, count: int, side: int) -> str:
    """A line about one part, in its own process."""
    places = {"images": work / f"images-{count}-{side}", "out": work / "out", "parquet": work / "parquet"}
    shutil.rmtree(places["out"], ignore_errors=True)
    words = [word.format(**places) for word in PARTS[part]]
    environment = os.environ | {
        "FINETUNE_CACHE": str(work / "cache"), "HF_HOME": str(work / "hf"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    command = [sys.executable, __file__, "--inside", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not done.stdout.strip():
        raise SystemExit(f"{part} failed:\n{done.stderr[-2000:]}")
    if part == "convert to parquet":
        shutil.rmtree(places["parquet"], ignore_errors=True)
        places["out"].rename(places["parquet"])
    return done.stdout.splitlines()[-1]


def inside(words: list[str]) -> None:
    """Runs one command here and prints its time and peak memory."""
    from contextlib import redirect_stdout

    from data_tools.__main__ import main

    began = time.perf_counter(), time.process_time()
    with redirect_stdout(sys.stderr):
        code = main(words) if words else 0
    spent, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    print(f"exit {code}, {cpu:.1f} s CPU, {spent:.1f} s on the clock, peak {peak_memory() / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=256, help="the shorter side in pixels")
    parser.add_argument("--only", action="append", choices=tuple(PARTS), default=[], help="one part; again for more")
    parser.add_argument("--work", type=Path, default=Path("/tmp/finetune-prepare"))
    asked = parser.parse_args()
    make_images(asked.work / f"images-{asked.count}-{asked.side}", asked.count, asked.side)
    for part in asked.only or PARTS:
        print(f"{asked.count:>7,} {part:>22}: {measured(part, asked.work, asked.count, asked.side)}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2:])
    else:
        main()
