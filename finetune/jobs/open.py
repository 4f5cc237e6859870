"""A finished run, an adapter file or an export, opened again as a family that draws."""

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
    """A family with a finished run's training in it, in the run's precision, or an adapter file merged into `base` in
    `dtype`; and run.json's record, an empty one for a file.

    Raises:
        BadInput: neither a finished run nor an adapter for that base.
    """
    if (source / "recipe.yaml").is_file():
        return open_run(RunFolder(source), device)
    adapter, _ = open_adapter(source, base)
    family = load_family(base, dtype=dtype)
    family.parts.to(device)
    apply_adapter(family, adapter)
    return family, RunRecord()


def open_run(folder: RunFolder, device: str | torch.device = "cpu") -> tuple[Family, RunRecord]:
    """A family with the run's training in it, in the precision in which the run held it; and run.json's record.

    Raises:
        BadInput: the run is not finished, or the base is not its base any more.
    """
    recipe, info = folder.recipe, folder.info
    trained = folder.result()
    precision = DTYPES[resolve_precision(recipe.run)]
    family = recipe.base.load(recipe.method.weight_dtype(precision))
    family.autocast = recipe.method.autocast_dtype(precision)
    if not is_base_of(family.folder, info.base_hash):
        raise BadInput(
            f"the base {recipe.base.source!r} is not the one that {folder.path} was trained on (its content changed): "
            "give the old one back, or train again"
        )
    recipe.method.add_subject_token(family, recipe.data.token, recipe.data.class_noun)
    recipe.method.attach(family, recipe.run.seed)
    recipe.method.load_state_dict(family, trained)
    family.parts.to(device)
    return family, info


def open_exported(folder: RunFolder, exported: Sequence[Exported], dtype: torch.dtype) -> Family | None:
    """What a user of the first good export gets: the file on a clean base, or the whole model. None: none is good."""
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
    """The first good file of new embeddings, if there is one."""
    item = next((item for item in exported if item.ok and artifact_of(item.format) == "embedding"), None)
    if item is not None:
        set_embeddings(family, embedding_exports([item.format])[0].read(item.path, family.name))
