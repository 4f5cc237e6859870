"""The arguments of the commands for adapter files: where is written, in which formats, and with which weight."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.core.errors import BadInput
from finetune.export.base import AdapterExport, ModelExport
from finetune.export.registry import EXPORTS, check_formats

ENDING = ".safetensors"
OTHER_ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".json")
LARGEST = 100.0  # of a weight: beyond it nothing of the base is left


@dataclass(frozen=True)
class Target:
    """Where adapters are written: files called `name` in `folder`, each format with its own ending. `file`: the
    user's own path of a single file."""

    folder: Path
    name: str
    file: Path | None = None


def target_of(out: str | Path, name: str) -> Target:
    """Reads --out: FILE.safetensors, a folder (FOLDER/ or an existing one), which gets files called `name`, or a path
    without ending.

    Raises:
        BadInput: it is empty, has another ending, or leads through a file.
    """
    text, path = str(out), Path(out)
    if not text.strip() or (not path.name and not path.is_dir()):
        raise BadInput(f"--out {text!r} names no file: give a path such as new{ENDING}")
    blocking = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if blocking is not None:
        raise BadInput(f"--out {text} leads through {blocking}, which is not a folder: give another path")
    if text.endswith(("/", os.sep)) or path.is_dir():
        if path.exists() and not path.is_dir():
            raise BadInput(f"--out {text} is a file, not a folder: leave the slash out, or give another path")
        return Target(path, name)
    if path.suffix.lower() in OTHER_ENDINGS:
        raise BadInput(f"--out {text} ends with {path.suffix}: LoRA files are written as {ENDING}, give such a name")
    if path.suffix == ENDING:
        return Target(path.parent, path.stem, path)
    return Target(path.parent, path.name)


def paths_of(target: Target, formats: Sequence[str], family: str) -> dict[str, Path]:
    """Format -> the path that it is written to.

    Raises:
        BadInput: a format is unknown or no LoRA file, or a folder has the name of a file.
    """
    check_adapter_formats(formats)
    exports = {wanted: EXPORTS[wanted]() for wanted in formats}
    found = {name: export.path(target.folder, target.name, family) for name, export in exports.items()}
    if target.file is None or len(found) > 1:
        return found
    (wanted,) = found
    if wanted == "peft":
        raise BadInput(f"--to peft writes a folder, not {target.file}: leave {ENDING} out of --out")
    return {wanted: target.file}


def check_adapter_formats(formats: Sequence[str]) -> None:
    """Raises:
    BadInput: a format is unknown, or is not one of LoRA files.
    """
    usable = [name for name, kind in EXPORTS.items() if issubclass(kind, AdapterExport)]
    for wanted in formats:
        if wanted in EXPORTS and wanted not in usable:
            more = ": `finetune merge --to folder` adds a LoRA to its base" if _is_model(wanted) else ""
            raise BadInput(f"--to {wanted} is not a format of LoRA files: use {', '.join(usable)}{more}")
    check_formats(formats)


def model_format(formats: Sequence[str], rank: int | None) -> str | None:
    """The format of a whole model among `formats`; None if all are formats of LoRA files.

    Raises:
        BadInput: both kinds are asked for, or several of models, or a rank for a model.
    """
    models = [name for name in formats if _is_model(name)]
    if not models:
        return None
    if len(formats) > 1:
        raise BadInput(
            f"--to {' --to '.join(formats)} asks for several results: a merge into the base writes one model (folder "
            "or checkpoint) and no LoRA file beside it: run the command once for each"
        )
    if rank is not None:
        raise BadInput(f"--rank {rank} is for LoRA files and --to {models[0]} writes a model: leave --rank out")
    return models[0]


def model_path(target: Target, wanted: str) -> Path:
    """The path of a whole model: a folder, or for `checkpoint` a file.

    Raises:
        BadInput: a folder has the name of a file.
    """
    if wanted == "checkpoint":
        return target.file or target.folder / f"{target.name}{ENDING}"
    if target.file is not None:
        raise BadInput(f"--to {wanted} writes a folder, not {target.file}: leave {ENDING} out of --out")
    return target.folder / target.name


def weighted(text: str) -> tuple[Path, float]:
    """Parses FILE or FILE:WEIGHT; the default weight is 1.

    Raises:
        BadInput: the weight is missing, is not a number, is 0, or is absurdly large.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError as error:
        missing = f"the weight after the colon is missing in {text!r}"
        fault = missing if not number.strip() else f"there is no file {text!r}, and {number!r} is not a weight"
        raise BadInput(f"{fault}: write FILE or FILE:0.7") from error
    if not math.isfinite(weight) or not 0 < abs(weight) <= LARGEST:
        raise BadInput(
            f"the weight {number} in {text!r} can't be used: give a number between -{LARGEST:g} and {LARGEST:g}, "
            "not 0, such as FILE:0.7"
        )
    return Path(name), weight


def _is_model(name: str) -> bool:
    return name in EXPORTS and issubclass(EXPORTS[name], ModelExport)
