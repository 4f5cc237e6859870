"""Checkpoints that can be trusted: safetensors and JSON with sizes and SHA-256, written beside and renamed.

RUN/checkpoints/step-000250/{trained,optimizer,ema}.safetensors + state.json
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.core.errors import BadInput
from finetune.core.files import flush, load_tensors, save_tensors, sha256, write_json
from finetune.core.records import check_schema

SCHEMA = 1  # of state.json; 0 had the same keys and no number


@dataclass(frozen=True)
class State:
    """Everything that a run needs to go on from `step`: all else is a function of the recipe and the step."""

    step: int  # optimiser steps done
    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)  # what is no tensor: optimiser counters, scaler


class Checkpoints:
    """The checkpoints of the run in the folder `run`. Only the main process writes."""

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / "checkpoints"

    def check_space(self, needed: int) -> None:
        """Refuses a run whose checkpoints (`needed` bytes in all) would not fit on the disk."""
        free = shutil.disk_usage(self.run).free
        if free < needed:
            raise BadInput(
                f"{self.run} has {free / 1e9:.2f} GB free but the run's checkpoints need {needed / 1e9:.2f} GB: free "
                "some space, lower run.keep, or choose another disk with run.dir=PATH"
            )

    def save(self, state: State, keep: int) -> Path:
        """Writes a checkpoint to a temporary folder, renames it, then drops the oldest beyond `keep`."""
        folder = self.path / f"step-{state.step:06d}"
        temporary = folder.with_name(f".{folder.name}.tmp")
        for left_over in folder.parent.glob(".step-*.tmp"):  # of a killed process
            shutil.rmtree(left_over, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            write_state(temporary, state)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            flush(folder.parent)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise BadInput(
                f"the checkpoint of step {state.step} could not be written to {folder.parent} "
                f"({error.strerror or error}); the one before is untouched: free some space, then "
                f"`finetune resume {self.run}`"
            ) from error
        for old in self._checkpoints()[:-keep]:
            shutil.rmtree(old)
        return folder

    def latest(self) -> State | None:
        """The newest checkpoint whose files match their sizes and hashes; a damaged one is named and skipped.

        Raises:
            BadInput: a later version wrote it.
        """
        for folder in reversed(self._checkpoints()):
            fault = find_fault(folder)
            if fault is None:
                return read_state(folder)
            warnings.warn(f"checkpoint {folder} is damaged ({fault}) and is passed over", stacklevel=2)
        return None

    def _checkpoints(self) -> list[Path]:
        return sorted(self.path.glob("step-*"))


def write_state(folder: Path, state: State) -> None:
    tensors = {"trained": state.trained, "optimizer": state.optimizer, "ema": state.ema}
    for name, part in tensors.items():
        if part:
            save_tensors(folder / f"{name}.safetensors", part)
    files = {
        file.name: {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.glob("*.safetensors"))
    }
    write_json(folder / "state.json", {"schema": SCHEMA, "step": state.step, "values": state.values, "files": files})


def read_state(folder: Path) -> State:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    parts = {name.removesuffix(".safetensors"): load_tensors(folder / name) for name in state["files"]}
    return State(state["step"], parts["trained"], parts.get("optimizer", {}), parts.get("ema", {}), state["values"])


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None.

    Raises:
        BadInput: a later version wrote it: that is no damage, and an older checkpoint is not to be taken in its place.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files, schema = state["files"], state.get("schema", 0)
    except (OSError, ValueError, KeyError) as error:
        return f"state.json: {error}"
    check_schema(schema, folder / "state.json", SCHEMA)
    for name, stated in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != stated["size"] or sha256(file) != stated["sha256"]:
            return f"{name} is not what was written"
    return None


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
