"""Every family x method, and every optimiser: a run that is killed and started again ends as the unbroken one, bit for
bit; and accumulated micro-batches make the step of the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune.families.registry import FAMILIES
from finetune.methods.registry import METHODS
from finetune.optim.registry import OPTIMISERS
from finetune.testing import contract
from finetune.testing.contract import ShortRun, train
from finetune.training.checkpoint import Checkpoints

USUAL = ("lora", "full")
CASES = [
    pytest.param(family, kind, marks=() if kind in USUAL else pytest.mark.slow)
    for family in FAMILIES
    for kind in METHODS
]
NEEDS_CUDA = ("paged_adamw8bit",)  # tests/contract/test_gpu.py
OPTIMISER_CASES = [
    *[("lora", optim) for optim in OPTIMISERS if optim not in NEEDS_CUDA],
    ("full", "prodigy"),
    ("full", "schedule_free"),
    ("full", "lion8bit"),
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_killed_and_resumed_is_the_unbroken_run(
    family: str, kind: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    contract.killed_and_resumed_is_the_unbroken_run(tiny_bases[family], kind, tmp_path)


@pytest.mark.parametrize(("kind", "optim"), OPTIMISER_CASES)
def test_with_every_optimiser_too(kind: str, optim: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    own = {"d_coef": 10.0} if optim == "prodigy" else {}  # so that its estimate moves in three steps
    settings = OPTIMISERS[optim](**own)
    contract.killed_and_resumed_is_the_unbroken_run(tiny_bases["sd1"], kind, tmp_path, settings)


def test_what_leaves_a_schedule_free_run_is_its_average(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """The mean of z, which has the squared rates as weights, here all the same; z from the checkpoints."""
    result = train(tiny_bases["sd1"], "lora", tmp_path, ShortRun(optim=OPTIMISERS["schedule_free"](lr=1e-2)))
    last = Checkpoints(tmp_path).latest()
    assert last is not None
    for number, (name, value) in enumerate(result.items()):
        y, z = last.trained[name], last.optimizer[f"{number}/z"]
        assert torch.allclose(value, (y - 0.1 * z) / 0.9, atol=1e-6)  # y = (1 - beta) z + beta x
        assert not torch.equal(value, y)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", USUAL)
def test_micro_batches_have_the_whole_batchs_gradient(
    family: str, kind: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """By its norm and the mean loss of the first step: Adam's step itself hides the gradient's size."""
    rows = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        train(tiny_bases[family], kind, folder, ShortRun(count=count, steps=1))
        rows.append(json.loads((folder / "metrics.jsonl").read_text()))
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
    assert rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-4) != 0
