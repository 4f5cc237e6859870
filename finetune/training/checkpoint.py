"""Checkpoints: safetensors and JSON with sizes and SHA-256, written to a temporary folder that is then renamed.

RUN/checkpoints/step-000250/{trained,optimizer,ema}.safetensors + state.json; of a sharded run (`run.shard`) a file for
each process, shard-00001-model-00001-of-00001.safetensors and on, with its rows of all of them.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.core.errors import BadInput
from finetune.core.files import flush, load_tensors, replacing_folder, save_tensors, sha256, write_json
from finetune.core.reading import read_json
from finetune.core.records import LaterVersion, check_schema
from finetune.training.pieces import Pieces

PARTS = ("trained", "optimizer", "ema")
FILES = {f"{part}.safetensors" for part in PARTS}
PROTECTED = "best.json"  # names the checkpoint that the verdicts recommend
SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # as torch.distributed.checkpoint names them
SCHEMA = 1  # version of state.json; version 0 had the same keys, but no number
SHARDED = 2  # version of state.json with `pieces`, which only sharded checkpoints have


@dataclass(frozen=True)
class State:
    """Everything that a run needs to continue after `step` steps; all else follows from the recipe and the step."""

    step: int  # completed optimiser steps
    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)  # no tensors: optimiser counters, loss scaler
    pieces: int = 1  # into how many the weights were cut when the optimiser's state was made


class Checkpoints:
    """The checkpoints of the run in the folder `run`. Only the main process may write."""

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / "checkpoints"

    def check_space(self, needed: int) -> None:
        """Checks that the run's checkpoints, `needed` bytes in total, fit on the disk.

        Raises:
            BadInput: they do not fit.
        """
        free = shutil.disk_usage(self.run).free
        if free < needed:
            raise BadInput(
                f"{self.run} has {free / 1e9:.2f} GB free but the run's checkpoints need {needed / 1e9:.2f} GB: free "
                "some space, lower run.keep, or choose another disk with run.dir=PATH"
            )

    def save(self, state: State, keep: int, write: Callable[[Path, State], None] | None = None) -> Path:
        """Writes a checkpoint to a temporary folder, renames the folder, and deletes old checkpoints beyond the newest
        `keep` and the one that is protected. Returns the checkpoint's folder. `write` writes its safetensors files;
        None: `write_tensors`.

        Raises:
            BadInput: it can't be written, for example because the disk is full.
        """
        folder = self.path / f"step-{state.step:06d}"
        for left_over in folder.parent.glob(".step-*.tmp"):  # left by a killed process
            shutil.rmtree(left_over, ignore_errors=True)
        try:
            with replacing_folder(folder) as temporary:
                (write or write_tensors)(temporary, state)
                sign(temporary, state)
            flush(folder.parent)
        except OSError as error:
            raise BadInput(
                f"the checkpoint of step {state.step} could not be written to {folder.parent} "
                f"({error.strerror or error}); the previous one is intact: free some space, then "
                f"`finetune resume {self.run}`"
            ) from error
        self._drop_others(folder, keep)
        return folder

    def protect(self, step: int) -> None:
        """The checkpoint of `step`, instead of the one before, is not deleted when later ones are saved."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / PROTECTED, {"step": step})

    def protected(self) -> int:
        """The step of the checkpoint that is not deleted; 0 for none."""
        try:
            step = read_json(self.path / PROTECTED, dict).get("step")
        except (OSError, BadInput):
            return 0
        return step if isinstance(step, int) and step > 0 else 0

    def drop_others(self, step: int, keep: int) -> None:
        """Deletes what `save` of this step deletes, after another one was protected."""
        self._drop_others(self.path / f"step-{step:06d}", keep)

    def newest_step(self) -> int:
        """The step of the newest checkpoint by name, whole or not; 0 for none."""
        return max(self.named_steps(), default=0)

    def named_steps(self) -> list[int]:
        """The steps of the checkpoints by name, whole or not, without reading them."""
        return [int(folder.name.removeprefix("step-")) for folder in self._checkpoints()]

    def _drop_others(self, written: Path, keep: int) -> None:
        """Leaves the one just written and the `keep` - 1 newest sound ones before it. Later ones, which a run that
        goes on from here passed over, are of no use any more, and damaged ones count for nothing."""
        left, best = keep - 1, self.path / f"step-{self.protected():06d}"
        for other in reversed([folder for folder in self._checkpoints() if folder != written]):
            if other == best and other < written:
                continue
            if left > 0 and other < written and find_fault(other) is None:
                left -= 1
            else:
                shutil.rmtree(other)

    def latest(self) -> State | None:
        """The newest checkpoint whose files match their sizes and hashes, or None. A warning names each damaged one
        that is skipped.

        Raises:
            BadInput: a later version of this program wrote it.
        """
        folder = self.newest_sound()
        return None if folder is None else read_state(folder)

    def newest_sound(self) -> Path | None:
        """The folder of `latest`; it warns and raises the same."""
        for folder in reversed(self._checkpoints()):
            fault = find_fault(folder)
            if fault is None:
                return folder
            warnings.warn(f"checkpoint {folder} is damaged ({fault}) and is skipped", stacklevel=2)
        return None

    def steps(self) -> list[int]:
        """The steps of the sound checkpoints, oldest first."""
        folders = [folder for folder in self._checkpoints() if find_fault(folder) is None]
        return [int(folder.name.removeprefix("step-")) for folder in folders]

    def check_step(self, step: int | None) -> int:
        """The step, if its checkpoint is kept and sound; of None: the newest such.

        Raises:
            BadInput: there is none; those that are kept are named.
        """
        kept = self.steps()
        if step is not None and step not in kept:
            raise BadInput(self._not_kept(step, kept))
        if not kept:
            raise BadInput(f"{self.run} has no checkpoint yet: `finetune resume {self.run}` goes on with it")
        return kept[-1] if step is None else step

    def state(self, step: int | None = None) -> State:
        """The sound checkpoint of `step`; None: the newest. A run may be at work here, and drop it meanwhile.

        Raises:
            BadInput: there is none, it is damaged or it was dropped; those that are kept are named.
        """
        for _ in range(3):  # what a run at work drops between two looks
            try:
                return read_state(self.path / f"step-{self.check_step(step):06d}")
            except FileNotFoundError:
                continue
        raise BadInput(f"the checkpoints of {self.run} changed while they were read: try again")

    def date(self, step: int) -> datetime:
        """When a checkpoint was written."""
        written = (self.path / f"step-{step:06d}" / "state.json").stat().st_mtime
        return datetime.fromtimestamp(written, UTC)

    def _not_kept(self, step: int, kept: list[int]) -> str:
        there = (self.path / f"step-{step:06d}").is_dir()
        listed = ", ".join(map(str, kept)) or "none"
        what = "is damaged" if there else "is not kept"
        return f"the checkpoint of step {step} of {self.run} {what}; kept are: {listed}. Choose one with --step"

    def _checkpoints(self) -> list[Path]:
        return sorted(folder for folder in self.path.glob("step-*") if folder.name.removeprefix("step-").isdecimal())


def write_tensors(folder: Path, state: State) -> None:
    for name in PARTS:
        part: dict[str, Tensor] = getattr(state, name)
        if part:
            save_tensors(folder / f"{name}.safetensors", part)


def sign(folder: Path, state: State) -> None:
    """Writes state.json: the step, the values, and the sizes and hashes of the files that are there."""
    files = {
        file.name: {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.glob("*.safetensors"))
    }
    cut = {"pieces": state.pieces} if state.pieces > 1 else {}
    schema = SHARDED if cut else SCHEMA
    about = {"schema": schema, "step": state.step, "values": state.values, "files": files, **cut}
    write_json(folder / "state.json", about)


def read_state(folder: Path) -> State:
    """A checkpoint, with its tensors in one piece."""
    state = stated(folder)
    files = Pieces(folder, state["files"])
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    if "pieces" not in state:
        parts |= {name.removesuffix(".safetensors"): load_tensors(folder / name) for name in state["files"]}
        return state_of(state, parts)
    for key in files.mine(0):
        part, _, name = key.partition("@")[0].partition("/")
        parts[part][name] = files.read(key)
    return state_of(state, parts)


def state_of(said: Mapping[str, Any], parts: Mapping[str, dict[str, Tensor]]) -> State:
    """`said`: the content of state.json. `parts`: name -> tensor, of "trained", "optimizer" and "ema"."""
    pieces: int = said.get("pieces", 1)
    return State(said["step"], parts["trained"], parts["optimizer"], parts["ema"], said["values"], pieces)


def stated(folder: Path) -> dict[str, Any]:
    """The content of state.json.

    Raises:
        BadInput: `sign` did not write it, or a later version did.
    """
    file = folder / "state.json"
    state = read_json(file, dict)
    check_schema(state.get("schema", 0), file, SHARDED)
    files, step, pieces = state.get("files"), state.get("step"), state.get("pieces", 1)
    if not isinstance(files, dict) or not _are_checkpoints(files) or not isinstance(pieces, int) or pieces < 1:
        raise BadInput(f"{file}: 'files' does not list the files of a checkpoint")
    if not isinstance(step, int) or step < 0 or not isinstance(state.get("values"), dict):
        raise BadInput(f"{file}: 'step' or 'values' has a value that no run writes")
    return state


def _are_checkpoints(files: dict[Any, Any]) -> bool:
    whole = "trained.safetensors" in files and files.keys() <= FILES
    cut = bool(files) and all(SHARD.fullmatch(name) for name in files)
    return (whole or cut) and all(isinstance(item, dict) for item in files.values())


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing.

    Raises:
        LaterVersion: a later version of this program wrote it. It is not damaged, so an older checkpoint must not be
            used instead.
    """
    try:
        files = stated(folder)["files"]
    except LaterVersion:
        raise
    except (OSError, BadInput) as error:
        return f"state.json: {error}"
    for name, about in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != about.get("size") or sha256(file) != about.get("sha256"):
            return f"{name} was changed after it was written"
    return None


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
