"""Whole runs with `run.weights: bf16`: resumed bit for bit, exported, opened again; and the plan's memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ends import resumed_is, weights
from safetensors.torch import load_file

from finetune.config.load import parse_recipe
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.jobs import train as job
from finetune.jobs.estimate import Estimate, estimate, report
from finetune.jobs.open import open_result
from finetune.testing.published import write as write_published
from finetune.training.rounding import SCRATCH

BF16 = torch.bfloat16


def asked(base: Path, photos: Path | str, optim: str = "adamw8bit", **run: Any) -> Recipe:
    return parse_recipe(
        {
            "base": str(base),
            "data": {"photos": str(photos), "class_noun": "mug"},
            "method": {"kind": "full", "parts": ["denoiser", "text_encoders"]},
            "optim": {"kind": optim, "lr": 1e-3},
            "run": {"weights": "bf16", "steps": 3, "checkpoint_every": 1, "verdicts": "off", **run},
            "sample": {"steps": 1, "prompts": ["a {noun}"], "every": 2},
        }
    )


def test_a_run_resumes_and_leaves_what_it_trained(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    recipe, run = asked(tiny_bases["sd1"], photos, ema=0.9, gradient_checkpointing=True), tmp_path / "whole"
    job.train(recipe, run)
    resumed_is(run, recipe, tmp_path / "stopped", 2)
    trained = weights(run)
    assert {value.dtype for value in trained.values()} == {BF16}
    kept = load_file(run / "checkpoints" / "step-000003" / "ema.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.float32}
    start = load_file(next((tiny_bases["sd1"] / "unet").glob("*.safetensors")))
    assert any(not torch.equal(trained[f"denoiser.{name}"], value.to(BF16)) for name, value in start.items())
    opened, _ = open_result(run)
    for part in ("denoiser", "text_encoder"):
        for name, value in opened.parts[part].named_parameters():
            assert value.dtype == BF16
            assert torch.equal(value, trained.get(f"{part}.{name}", value))
    (exported,) = json.loads((run / "exports.json").read_text())
    assert all(check.startswith("ok: ") for check in exported["checks"])
    assert (run / "samples" / "step-000002").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_other_families_train(family: str, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run = job.train(asked(tiny_bases[family], photos, "lion8bit"), tmp_path / "run")
    assert {value.dtype for value in weights(run).values()} == {BF16}
    (exported,) = json.loads((run / "exports.json").read_text())
    assert all(check.startswith("ok: ") for check in exported["checks"])


def test_the_plan_counts_what_is_held(tiny_bases: dict[str, Path]) -> None:
    """2 bytes each for a weight and its gradient, the moments and the average as ever, and no copy for autocast. An
    update needs memory where the activations were."""

    def counted(**run: Any) -> Estimate:
        return estimate(asked(tiny_bases["sd1"], "photos", **run))

    held, wide = counted(), counted(weights="fp32", precision="bf16")
    count = held.trained_parameters
    assert held.trained == pytest.approx(count * (2 + 2 + 2.03))
    assert wide.trained == pytest.approx(count * (4 + 4 + 2.03 + 2))
    assert held.activations == max(wide.activations, SCRATCH * count)
    assert counted(ema=0.9).trained == pytest.approx(held.trained + 4 * count)
    assert "trained weights in bf16" in report(asked(tiny_bases["sd1"], "photos"))["precision"]


@pytest.mark.slow
def test_sdxl_fits_in_16_gb(tmp_path: Path) -> None:
    """All of its denoiser, with 8-bit Adam and gradient checkpointing, one photo of 1024 pixels in a step."""
    plain = asked(write_published("SDXL", tmp_path), "photos", gradient_checkpointing=True)
    own = estimate(plain.model_copy(update={"method": plain.method.model_copy(update={"parts": ["denoiser"]})}))
    assert own.trained_parameters > 2.5e9
    assert own.total < 15.2 * 2**30


def test_another_precision_is_refused(tiny_bases: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match=r"run\.weights is bf16 but run\.precision is fp32: set run\.precision=bf16"):
        asked(tiny_bases["sd1"], "photos", precision="fp32")
