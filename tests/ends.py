"""A run that is killed and goes on: it ends as the run that nobody stopped. For every test that asks this of a job."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from finetune.config.recipe import Recipe
from finetune.jobs import train as job
from finetune.testing.kill import killed_at


def resumed_is_the_unbroken_run(recipe: Recipe, folder: Path, step: int = 3) -> Path:
    """Trains `recipe` in folder/whole, and in folder/stopped, where it is killed at `step` and resumed.

    Returns the unbroken run. Weights are compared bit for bit, metrics without their timing."""
    whole = job.train(recipe, folder / "whole")
    resumed_is(whole, recipe, folder / "stopped", step)
    return whole


def resumed_is(whole: Path, recipe: Recipe, stopped: Path, step: int = 3) -> None:
    """As above, beside an unbroken run that is there."""
    with killed_at(step):
        job.train(recipe, stopped)
    job.resume(stopped)
    wanted, found = (weights(run) for run in (whole, stopped))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert metrics(whole) == metrics(stopped)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What the run trained."""
    return load_file(run / "adapter" / "trained.safetensors")


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
