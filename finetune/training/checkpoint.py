"""The run folder: recipe, metrics, checkpoints that can be trusted, and where to go on.

RUN/recipe.yaml            the resolved recipe          RUN/samples/    before, after, step-000100
RUN/run.json               what was found out           RUN/exports/    files for other programs
RUN/metrics.jsonl          one line a step              RUN/report.html the page
RUN/checkpoints/step-000250/{trained,optimizer,ema}.safetensors + state.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.core.files import load_tensors, save_tensors, sha256, write_json


@dataclass(frozen=True)
class State:
    """Everything that a run needs to go on from `step`: all else is a function of the recipe and the step."""

    step: int  # optimiser steps done
    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)  # what is no tensor: optimiser counters, scaler


def write_state(folder: Path, state: State) -> None:
    tensors = {"trained": state.trained, "optimizer": state.optimizer, "ema": state.ema}
    for name, part in tensors.items():
        if part:
            save_tensors(folder / f"{name}.safetensors", part)
    files = {
        file.name: {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.glob("*.safetensors"))
    }
    write_json(folder / "state.json", {"step": state.step, "values": state.values, "files": files})


def read_state(folder: Path) -> State:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    parts = {name.removesuffix(".safetensors"): load_tensors(folder / name) for name in state["files"]}
    return State(state["step"], parts["trained"], parts.get("optimizer", {}), parts.get("ema", {}), state["values"])


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = state["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"state.json: {error}"
    for name, stated in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != stated["size"] or sha256(file) != stated["sha256"]:
            return f"{name} is not what was written"
    return None


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def clone(tensors: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
