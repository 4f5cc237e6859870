"""Checks whether the toolkit works on this GPU, and measures its speed and memory: ten minutes, without downloads.

    python benchmarks/gpu.py                  # every part; docs/results-gpu.md and benchmarks/rows/gpu.jsonl
    python benchmarks/gpu.py --only jobs      # some parts; their new rows replace the old ones
    python benchmarks/gpu.py --cpu --out DIR  # every part at the size of the tests, to check this program itself

Bases with published sizes and random weights are created on the device. Each part has its own process and time limit.
The most informative parts run first, and every row is saved at once, so an interrupted run keeps its results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")
CPU_PATIENCE = 6  # factor for the time limits of a GPU
NAMES = (
    "device", "demo", "numbers", "resume", "jobs", "stops", "waits", "speed-sd1-lora", "speed-sdxl-lora",
    "speed-sdxl-full-bf16", "start", "speed-flux-lora", "speed-sd1-full", "speed-sdxl-full", "speed-sd3-lora",
    "speed-sd3-full", "tests",
)  # fmt: skip


def parts() -> dict[str, Any]:
    """Name -> part, the most informative first."""
    import gpu_correctness as works
    import gpu_speed as fast
    from gpu_common import Part
    from gpu_waits import waits

    found = [
        Part("device", 20, fast.device), Part("demo", 120, works.demo), Part("numbers", 60, works.numbers),
        Part("resume", 90, works.resume), Part("jobs", 120, works.jobs), Part("stops", 30, works.stops),
        Part("waits", 180, waits), Part("tests", 570, works.tests), Part("start", 60, fast.start), *fast.SPEED,
    ]  # fmt: skip
    named = {part.name: part for part in found}
    assert set(named) == set(NAMES)
    return {name: named[name] for name in NAMES}


def main() -> int:
    arguments = parse()
    if arguments.part:
        return child(arguments)
    out = arguments.out or ROOT
    rows_file = (out if arguments.out else ROOT / "benchmarks" / "rows") / "gpu.jsonl"
    page = (out if arguments.out else ROOT / "docs") / "results-gpu.md"
    chosen = [name for name in NAMES if not arguments.only or name in arguments.only]
    if not arguments.cpu and not has_cuda():
        print("there is no CUDA device here: run this on a machine with one, or pass --cpu --out DIR", file=sys.stderr)
        return 2
    if arguments.cpu and not arguments.out:
        print("--cpu needs --out DIR: its rows are not results and must not replace them", file=sys.stderr)
        return 2
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for row in read(rows_file) if row["part"] not in chosen]
    deadline = time.monotonic() + arguments.minutes * 60
    waiting = None
    for name, after in zip(chosen, [*chosen[1:], None], strict=True):
        process = waiting or begin(name, arguments)
        waiting = begin(after, arguments) if after else None  # it imports while the previous part runs
        rows += finish(name, process, deadline, rows_file.with_suffix(f".{name}.jsonl"), arguments.cpu)
        write(rows_file, rows)
    print("\n" + table(rows, arguments.cpu))
    page.write_text(table(rows, arguments.cpu), encoding="utf-8", newline="\n")
    return 0 if all(row.get("ok", True) for row in rows) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="PART", help=", ".join(NAMES))
    parser.add_argument("--cpu", action="store_true", help="every part at the size of the tests, on the CPU")
    parser.add_argument("--out", type=Path, help="where rows and page are written (default: this checkout)")
    parser.add_argument("--minutes", type=float, default=9.5, help="parts that would begin later are left out")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def begin(name: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """Starts a process that imports everything and then waits for a line on its standard input."""
    folder = (arguments.out or ROOT / "benchmarks" / "rows").absolute()
    command = [sys.executable, __file__, "--part", name, "--rows", str(folder / f"gpu.{name}.jsonl")]
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if arguments.cpu else {})
    return subprocess.Popen(
        [*command, *(["--cpu"] if arguments.cpu else [])], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, env=env,
    )  # fmt: skip


def finish(name: str, process: subprocess.Popen[str], deadline: float, file: Path, cpu: bool) -> list[dict[str, Any]]:
    """The part's rows. If it failed or took too long, the last row reports that."""
    left = deadline - time.monotonic()
    if left < 5:
        end(process)
        return [{"part": name, "what": f"part {name}", "table": "works", "ok": False, "value": "no time was left"}]
    began = time.monotonic()
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or []), daemon=True)
    reader.start()
    assert process.stdin is not None
    limit = min(left, parts()[name].seconds * (CPU_PATIENCE if cpu else 1))
    try:
        process.stdin.write(f"{limit}\n")
        process.stdin.close()
        process.wait(limit + 30 if name == NAMES[0] else limit)
        fault = "" if process.returncode == 0 else "".join(said[-3:]).strip()[-400:] or f"exit {process.returncode}"
    except subprocess.TimeoutExpired:
        fault = f"cut off after {limit:.0f} s"
    except BrokenPipeError:
        fault = "".join(said[-3:]).strip()[-400:]
    end(process)
    rows = [{"part": name, **row} for row in read(file)]
    file.unlink(missing_ok=True)
    if fault:
        rows.append({"part": name, "what": f"part {name}", "table": "works", "ok": False, "value": fault})
    print(f"{name:>18}  {time.monotonic() - began:5.0f} s  {verdict(rows)}", flush=True)
    return rows


def end(process: subprocess.Popen[str]) -> None:
    """Ends the process and all processes that it started."""
    if process.poll() is None:
        for started in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                started.kill()
        process.kill()
        process.wait()


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    checked = [row["ok"] for row in rows if "ok" in row]
    bad = [f"{row['what']}: {row.get('value', '')}" for row in rows if row.get("ok") is False]
    return f"{len(rows)} rows, {sum(checked)} of {len(checked)} checks hold" + "".join(
        f"\n      {line}" for line in bad
    )


def child(arguments: argparse.Namespace) -> int:
    """Runs one part, and writes every row at once."""
    from finetune.core.logging import quiet, quiet_bars

    quiet()
    part = parts()[arguments.part]
    import torch
    from gpu_common import Where

    import finetune.jobs.train  # noqa: F401 - before the clock starts

    quiet_bars()
    if not sys.stdin.readline():
        return 1
    arguments.rows.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as work:
        os.environ["FINETUNE_CACHE"] = str(Path(work) / "cache")
        os.chdir(work)
        where = Where(torch.device("cpu" if arguments.cpu else "cuda"), arguments.cpu, Path(work))
        try:
            for row in part.run(where):
                with arguments.rows.open("a", encoding="utf-8", newline="\n") as file:
                    file.write(json.dumps(row) + "\n")
        except Exception:
            traceback.print_exc()
            return 1
    return 0


def read(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    ordered = sorted(rows, key=lambda row: NAMES.index(row["part"]))
    file.write_text("".join(json.dumps(row) + "\n" for row in ordered), encoding="utf-8", newline="\n")


def table(rows: Sequence[dict[str, Any]], cpu: bool) -> str:
    from gpu_page import page

    return page(rows, about(cpu), cpu)


def about(cpu: bool) -> dict[str, str]:
    import torch

    found = {"date": datetime.date.today().isoformat(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    name = "CPU, tiny sizes: these are not results" if cpu else torch.cuda.get_device_name(0)
    return {"device": name} | found


if __name__ == "__main__":
    sys.exit(main())
