"""benchmarks/gpu.py without a GPU: every part at the size of the tests, and what it says where it can't run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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


SMALL = {
    "unet": {
        "_class_name": "UNet2DConditionModel", "in_channels": 4, "sample_size": 16, "cross_attention_dim": 32,
        "attention_head_dim": 4, "block_out_channels": [32, 64], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "text_encoder": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "projection_dim": 32,
    },
    "vae": {
        "_class_name": "AutoencoderKL", "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2, "block_out_channels": [32, 32], "layers_per_block": 1,
        "latent_channels": 4,
    },
    "scheduler": {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"},
}  # fmt: skip


@pytest.fixture
def where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """As on a GPU, with a small base in place of SD 1.5: published configs, random weights, no tiny sizes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_common import Where

    from finetune.testing import published

    monkeypatch.setitem(published.PUBLISHED, "SD 1.5", ("sd1", "StableDiffusionPipeline", SMALL, 0))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    device = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    return Where(torch.device("cpu"), False, tmp_path)


def test_every_way_of_the_waits_has_its_row(where: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same base is prepared anew for each way."""
    import gpu_waits

    monkeypatch.setattr(gpu_waits, "SIDES", (32,))
    ways = {what: settings for what, settings in gpu_waits.WAYS.items() if settings.get("compile") != "regional"}
    monkeypatch.setattr(gpu_waits, "WAYS", ways)
    rows = list(gpu_waits.waits(where))
    assert [row["what"] for row in rows if row["table"] == "waits"] == list(ways)
    assert all(row["ok"] for row in rows if row["table"] == "works")


@pytest.mark.parametrize(("kind", "checkpointed"), [("lora", False), ("full-bf16", True)])
def test_a_speed_row_counts_no_recomputation(
    kind: str, checkpointed: bool, where: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDXL in 16 GB is asked with gradient checkpointing, also of a GPU that needs none."""
    import gpu_speed

    monkeypatch.setattr(gpu_speed, "SIDES", (32,))
    row, _ = gpu_speed.speed("SD 1.5", kind, where)
    assert row["checkpointing"] is checkpointed
    case = gpu_speed.prepared(where, "SD 1.5", kind)
    case.side, case.batch = 32, 1
    denoiser = case.family.parts["denoiser"]
    assert denoiser.is_gradient_checkpointing is checkpointed
    denoiser.enable_gradient_checkpointing()
    twice = gpu_speed.counted(gpu_speed.forward_backward(case))
    assert gpu_speed.flops_of(case) == row["flops"] < twice
    case.batch = 3
    assert gpu_speed.flops_of(case) == 3 * row["flops"]
    assert denoiser.is_gradient_checkpointing


def test_a_bad_step_is_told_from_an_updated_one(where: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where it is read after a later step; a loss scaler would apply that one."""
    import gpu_correctness
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from finetune.training import accelerate, readings

    def with_scaler(run: Any, adapter: bool) -> Accelerator:
        accelerator = Accelerator(mixed_precision="fp16", cpu=True)
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
        return accelerator

    monkeypatch.setattr(readings, "reads_late", lambda device: True)
    monkeypatch.setattr(accelerate, "make_accelerator", with_scaler)
    AcceleratorState._reset_state(reset_partial_state=True)
    for kind in ("lora", "full"):
        assert "step 2 is not finite" in gpu_correctness.stopped_at_nan(where, kind, "fp16")
