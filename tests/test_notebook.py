"""examples/notebook.ipynb runs from top to bottom, with a few steps set after its cell of parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
SHORT = [
    "run.steps=2", "optim.warmup=0", "prior.count=2", "prior.others=null",
    "prior.steps=1", "sample.steps=1", "sample.count=1",
    "sample.prompts=['a photo of {token} {noun}']",
]  # fmt: skip


def code_cells() -> list[dict]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    first, *others = code_cells()
    assert first["metadata"]["tags"] == ["parameters"]
    cells = ["".join(first["source"]), f"overrides = {SHORT}", *("".join(cell["source"]) for cell in others)]
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(cells), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "notebook"
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert "2 steps; mean loss" in done.stdout
    assert "demo.safetensors" in done.stdout
    assert "ok:" in done.stdout
    assert Image.open(next((run / "samples" / "after").glob("*.png"))).size == (128, 128)


def test_the_notebook_is_stored_without_outputs() -> None:
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code_cells())
