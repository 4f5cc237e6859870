"""New words in several processes: one result. Captions are dropped often, so that one process sees no new word."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_processes import ENVIRONMENT, distance, losses

PROGRAM = """
import sys, work_words
from finetune.cli.launch import launch
code, message = launch({count}, work_words.work, sys.argv[1:])
print(message, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
def test_one_and_two_processes_end_equal(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        command = [sys.executable, "-c", PROGRAM.format(count=count), str(tmp_path / str(count)), str(photos)]
        command.append(str(tiny_bases["sdxl"]))
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("textual_inversion", "pivotal"):
        one, two = (tmp_path / count / "runs" / name for count in ("1", "2"))
        assert len(losses(one)) == 12
        assert losses(two) == pytest.approx(losses(one), rel=1e-5)
        assert distance(*(load_file(run / "adapter" / "trained.safetensors") for run in (one, two))) < 1e-5, name
