"""benchmarks/gpu.py without a GPU: every part at the size of the tests, and what it says where it can't run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
GROUPS = {
    "correct": ["numbers", "stops", "tests", "device", "waits"],
    "jobs": ["jobs"],
    "resume": ["resume", "demo", "start"],
    "speed": [
        "speed-sd1-lora", "speed-sdxl-lora", "speed-flux-lora", "speed-sd3-lora", "speed-sd1-full", "speed-sdxl-full",
        "speed-sd3-full", "speed-sdxl-full-bf16",
    ],
}  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def test_the_groups_are_all_parts() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu

    assert sorted(name for group in GROUPS.values() for name in group) == sorted(gpu.NAMES)
    assert list(gpu.parts()) == list(gpu.NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("group", list(GROUPS))
def test_every_part_runs_at_tiny_size(group: str, tmp_path: Path) -> None:
    done = run("--cpu", "--out", str(tmp_path), "--minutes", "20", "--only", *GROUPS[group])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == set(GROUPS[group])
    assert all(row["ok"] for row in rows if "ok" in row)
    page = (tmp_path / "results-gpu.md").read_text()
    assert "these are not results" in page
    assert all(row["what"] in page for row in rows if row["table"] != "device")
    if group == "speed":
        assert all(row["ours_ms"] > 0 and row["bare_ms"] > 0 and row["flops"] > 0 for row in rows)


def test_a_part_without_time_says_so_and_older_rows_stay(tmp_path: Path) -> None:
    old = {"part": "device", "table": "device", "what": "x", "tflops": 1.0, "gb_per_s": 2.0}
    (tmp_path / "gpu.jsonl").write_text(json.dumps(old) + "\n")
    done = run("--cpu", "--out", str(tmp_path), "--minutes", "0", "--only", "stops")
    assert done.returncode == 1
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert rows == [
        old,
        {"part": "stops", "what": "part stops", "table": "works", "ok": False, "value": "no time was left"},
    ]
    assert "**NO**" in (tmp_path / "results-gpu.md").read_text()


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    done = run()
    assert done.returncode == 2
    assert "--cpu" in done.stderr
    assert "--out" in run("--cpu").stderr


def test_the_profilers_own_wait_is_none_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's profiler synchronises the device when it stops, inside of what it records."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_loops import summary

    def event(name: str, start: float) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=None, cpu_time_total=1000.0, time_range=SimpleNamespace(start=start)
        )

    own, read = event("cudaDeviceSynchronize", 9.0), event("cudaStreamSynchronize", 2.0)
    for events, waits in (([own], 0), ([own, read], 1), ([read], 1)):
        found = summary(SimpleNamespace(events=lambda events=events: events), 1, 0.005)
        assert (found["waits"], found["host_ms"]) == (waits, 5.0 - waits)
