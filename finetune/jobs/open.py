"""Opens a finished run, an adapter file or an export as a family that can draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from finetune.adapters.inspection import open_adapter
from finetune.core.devices import DTYPES
from finetune.core.errors import BadInput
from finetune.export.base import Adapter, AdapterExport, Exported, ModelExport
from finetune.export.lora.peft import Peft
from finetune.export.registry import EXPORTS, artifact_of, embedding_exports
from finetune.export.verify import apply_adapter
from finetune.families.base import Family
from finetune.families.digests import is_base_of
from finetune.families.source import load_family
from finetune.methods.embeddings import set_embeddings
from finetune.methods.peft_adapter import read_native_form
from finetune.runs.folder import RunFolder
from finetune.runs.record import RunRecord
from finetune.training.accelerate import resolve_precision


def open_result(
    source: Path, base: str = "tiny", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Family, RunRecord]:
    """Opens a finished run, or an adapter file.

    Args:
        source: a run folder or an adapter file.
        base: the base for an adapter file, which is merged into it. A run uses its own base.
        device: where the family is placed.
        dtype: the precision for an adapter file. A run uses its own precision.

    Returns:
        The family with the trained weights, and the record of the run (an empty one for an adapter file).

    Raises:
        BadInput: `source` is neither a finished run nor an adapter for that base.
    """
    if (source / "recipe.yaml").is_file():
        return open_run(RunFolder(source), device)
    adapter, _ = open_adapter(source, base)
    family = load_family(base, dtype=dtype)
    family.parts.to(device)
    apply_adapter(family, adapter)
    return family, RunRecord()


def open_run(folder: RunFolder, device: str | torch.device = "cpu") -> tuple[Family, RunRecord]:
    """Opens a finished run.

    Returns:
        The run's base with the trained weights, on `device` and in the run's precision, and the record of the run.

    Raises:
        BadInput: the run is not finished, or its base has changed.
    """
    recipe, info = folder.recipe, folder.info
    trained = folder.result()
    precision = DTYPES[resolve_precision(recipe.run)]
    family = recipe.base.load(recipe.method.weight_dtype(precision))
    family.autocast = recipe.method.autocast_dtype(precision)
    if not is_base_of(family.folder, info.base_hash):
        raise BadInput(
            f"the base {recipe.base.source!r} is not the one that {folder.path} was trained on (its content changed): "
            "restore the old base, or train again"
        )
    recipe.method.add_subject_token(family, recipe.data.token, recipe.data.class_noun)
    recipe.method.attach(family, recipe.run.seed)
    recipe.method.load_state_dict(family, trained)
    family.parts.to(device)
    return family, info


def open_exported(folder: RunFolder, exported: Sequence[Exported], dtype: torch.dtype) -> Family | None:
    """Opens the first export that passed its checks, as another program would: on an unchanged base, in `dtype`.

    Returns:
        The family, or None if no export passed.

    Raises:
        BadInput: the file or the base can't be read.
    """
    item = next((item for item in exported if item.ok), None)
    if item is None:
        return None
    base, export = folder.recipe.base, EXPORTS[item.format]()
    if isinstance(export, ModelExport):
        return export.open(item.path, base, dtype)
    family, method, data = base.load(dtype), folder.recipe.method, folder.recipe.data
    method.add_subject_token(family, data.token, data.class_noun)
    _read_words(family, exported)
    if not isinstance(export, AdapterExport):
        return family
    if item.format == Peft.name and method.is_adapter and not method.adapter.low_rank:
        read_native_form(family, item.path)
        return family
    apply_adapter(family, _read_adapter(export, item.path, family))
    return family


def _read_adapter(export: AdapterExport, file: Path, family: Family) -> Adapter:
    if export.recognised:
        return open_adapter(file, str(family.folder))[0]
    return export.read(file, family.name, family.folder)


def _read_words(family: Family, exported: Sequence[Exported]) -> None:
    """Loads the first export of new embeddings that passed its checks, if there is one."""
    item = next((item for item in exported if item.ok and artifact_of(item.format) == "embedding"), None)
    if item is not None:
        set_embeddings(family, embedding_exports([item.format])[0].read(item.path, family.name))
