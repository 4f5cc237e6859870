"""benchmarks/loaders.py: what it measures of a good file, a spoilt one and a refused one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from loaders import measured
from loaders_cases import Base, cases
from loaders_readers import DiffusersReader


@pytest.mark.slow
def test_rows_say_what_a_reader_did(tmp_path: Path) -> None:
    case = next(cases(Base.written("SD 1.5", tmp_path / "base"), tmp_path))
    good = measured(DiffusersReader(), case)
    assert (good.form, good.applied, good.of, good.refused) == ("kohya", 192, 192, "")
    assert good.error is not None
    assert good.error < 1e-5
    tensors = load_file(case.path)
    name = next(key for key in tensors if key.endswith(".lora_up.weight"))
    save_file(tensors | {name: tensors[name] * 2}, case.path)
    assert measured(DiffusersReader(), case).error == pytest.approx(1, rel=1e-3)
    save_file({"x": torch.ones(1)}, case.path)
    refused = measured(DiffusersReader(), case)
    assert refused.applied == 0
    assert refused.refused
