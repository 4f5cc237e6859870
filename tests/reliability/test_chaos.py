"""The chaos program with few kills: what it says, and that it can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "optim"), [("lora", "adamw"), ("full", "adamw8bit")])
def test_killed_runs_end_as_the_unbroken_one(method: str, optim: str, tmp_path: Path) -> None:
    kinds = ["--method", method, "--optim", optim, "--seed", "3"]
    command = [sys.executable, ROOT / "benchmarks" / "chaos.py", "--kills", "6", "--work", tmp_path, *kinds]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "6 kills: " in done.stdout
    runs, same = done.stdout.splitlines()[-1].split(" runs completed, ")
    assert same.startswith(runs)
    assert len(list(tmp_path.glob("run-*"))) == int(runs) >= 1
