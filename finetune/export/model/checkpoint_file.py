"""Writes a whole model as one file in the original layout, which every UI loads, and reads it back as a check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from finetune.core.devices import DTYPES, gib
from finetune.core.errors import BadInput
from finetune.core.files import save_tensors
from finetune.core.records import Check
from finetune.export.base import Exported, ModelExport, Request, unchecked
from finetune.export.metadata import checkpoint_metadata
from finetune.export.model.model_folder import unlike
from finetune.export.settings import Verify
from finetune.families.base import Family
from finetune.families.naming.base import SingleFile
from finetune.families.naming.single_file import marks, pack, unpacked
from finetune.families.settings import Base
from finetune.families.source import load_family, resolve_base
from finetune.objectives.schedule import Schedule

READ_BY = ["ComfyUI", "Forge", "A1111", "InvokeAI", "sdnext", "diffusers"]


class Checkpoint(ModelExport):
    name = "checkpoint"
    usual = False

    def path(self, folder: Path, name: str, family: str) -> Path:
        return folder / f"{name}.safetensors"

    def obstacle(self, family: Family) -> str:
        if family.inputs is not None:
            return f"a base with {family.inputs} inputs"
        return (
            ""
            if family.naming.single_file is not None
            else f"a {family.name}: this program has no single-file layout for it"
        )

    def export(self, family: Family, path: Path, request: Request, verify: Verify) -> Exported:
        return export_checkpoint(family, path, request.dtype, request.about, verify)

    def open(self, path: Path, base: Base, dtype: torch.dtype) -> Family:
        like = resolve_base(base.source, base.revision, base.like)
        return load_family(str(path), dtype=dtype, like=str(like))

    def checking(self, parts: Mapping[str, float], verify: Verify) -> str:
        return f"a file of {gib(sum(parts.values()))} in main memory, in addition to the trained model"


def export_checkpoint(
    family: Family, path: Path, dtype: str, about: dict[str, str], verify: Verify = "full"
) -> Exported:
    """Writes `path` in `dtype` (replacing an older export), reads every weight back and compares it.

    Raises:
        BadInput: this family has no original layout.
    """
    layout = family.naming.single_file
    if layout is None or family.inputs is not None:
        what = f"{family.name}{f' with {family.inputs} inputs' if family.inputs else ''}"
        raise BadInput(f"this program has no single-file layout for {what}: use --to folder")
    family.parts.restore()
    tensors = pack(layout, family.parts, DTYPES[dtype])
    if isinstance(family.schedule, Schedule):
        tensors |= marks(layout, family.schedule)
    v_prediction = family.schedule.prediction == "v_prediction"
    save_tensors(path, tensors, checkpoint_metadata(family.name, about, v_prediction))
    written = len(tensors)
    del tensors
    if verify == "off":
        return unchecked(Checkpoint.name, path, written)
    count, check = _compare(family, layout, path, DTYPES[dtype])
    size, error, readers = path.stat().st_size, 0.0 if check.passed else float("inf"), READ_BY if check.passed else []
    return Exported(Checkpoint.name, path, size, count, error, readers, [check])


def _compare(family: Family, layout: SingleFile, path: Path, dtype: torch.dtype) -> tuple[int, Check]:
    """Compares every weight in the file with the one in memory, rounded to the stored precision."""
    held = load_file(path)
    count = 0
    for part, module in family.parts.items():
        weights = module.state_dict()
        try:
            again = dict(unpacked(held, layout, part, module, path))
        except BadInput as error:
            return count, Check("file", False, str(error))
        for key, value in again.items():
            fault = unlike(weights[key], value, dtype)
            if fault:
                return count, Check("weights", False, f"{part}.{key} {fault}")
        count += len(again)
    return count, Check("weights", True, f"{count} weights re-read, bit for bit in the stored precision", 0.0)
