"""A run or one of its checkpoints, an adapter file or an export, opened again as a family that draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from finetune.adapters.inspection import inspect_adapter, open_adapter
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.core.logging import quieted
from finetune.export.base import Adapter, AdapterExport, Exported, ModelExport, NativeExport
from finetune.export.bench import Bench
from finetune.export.lora.peft import Peft
from finetune.export.native import open_native
from finetune.export.registry import EXPORTS, artifact_of, embedding_exports
from finetune.export.verify import apply_adapter
from finetune.families.base import Family
from finetune.families.digests import is_base_of
from finetune.families.source import load_family
from finetune.families.toy import TINY
from finetune.jobs.precision import base_dtype, set_precision
from finetune.methods.embeddings import set_embeddings
from finetune.methods.peft_adapter import read_native_form
from finetune.optim.state import load_state_tensors
from finetune.runs.folder import RunFolder, is_run
from finetune.runs.record import RunRecord
from finetune.training.checkpoint import State
from finetune.training.ema import copy_into


@quieted()
def open_result(
    source: Path,
    base: str = "tiny",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    weight: float = 1.0,
    step: int | None = None,
) -> tuple[Family, RunRecord]:
    """A family with a run's training in it (`open_run`), in the run's precision, or an adapter file merged into `base`
    in `dtype`; and run.json's record, an empty one for a file.

    Args:
        weight: the strength of the LoRA.
        step: of a run's checkpoint.

    Raises:
        BadInput: neither a run nor an adapter for that base, or no such checkpoint; a weight for what is no LoRA.
    """
    if not math.isfinite(weight):
        raise BadInput(f"the LoRA's weight is {weight}: give a number, such as 0.8")
    if is_run(source):
        family, info = open_run(RunFolder(source), device, step)
        _weaken(RunFolder(source), family, weight)
        return family, info
    if step is not None:
        raise BadInput(f"--step {step} chooses a run's checkpoint and {source} is no run folder: leave it out")
    adapter, _ = open_adapter(source, base)
    family = load_family(base, dtype=dtype)
    family.parts.to(device)
    apply_adapter(family, replace(adapter, scale=adapter.scale * weight))
    return family, RunRecord()


def base_to_draw(source: Path, base: str | None) -> str:
    """The base that an adapter file is opened with; a run has its own, and then this is not used.

    Raises:
        BadInput: a base was named beside a run, or none beside a file that was not trained on the tiny base.
    """
    if is_run(source):
        if base is not None:
            raise BadInput(
                f"--base {base} is for adapter files and the run {source} has its own base: leave --base out"
            )
        return TINY
    if base is not None:
        return base
    compared = inspect_adapter(source).compared
    if compared.weights:  # of what a file can name by itself, only the tiny base is here with its weights
        return TINY
    raise BadInput(
        f"{source} is not for tiny: its header or its modules tell of {compared.words}: name the base to draw with, "
        "a folder or a hub id, with --base BASE"
    )


def _weaken(folder: RunFolder, family: Family, weight: float) -> None:
    """The trained LoRA at another strength."""
    if weight == 1:
        return
    method = folder.recipe.method.adapter
    if not method.low_rank:
        raise BadInput(
            f"a weight of {weight} is for a LoRA and {folder.path} trained method.kind {folder.recipe.method.kind}: "
            "leave it out"
        )
    state = method.state_dict(family)
    scaled = {name: value * weight if ".lora_B." in name else value for name, value in state.items()}
    method.load_state_dict(family, scaled)


def open_run(
    folder: RunFolder, device: str | torch.device = "cpu", step: int | None = None
) -> tuple[Family, RunRecord]:
    """A family with the run's training in it, in the precision in which the run held it; and run.json's record.

    Args:
        step: of the checkpoint. Its EMA or its optimiser's average is taken, where there is one, as at a run's end.
            None: the result, or the newest checkpoint of a run that has not finished (`RunFolder.step_to_open`).

    Raises:
        BadInput: there is no such checkpoint, or the base is not its base any more.
    """
    recipe, info = folder.recipe, folder.info
    chosen = folder.step_to_open(step)
    state = None if chosen is None else folder.checkpoints.state(chosen)
    result = folder.result() if state is None else {}
    family = recipe.base.load(base_dtype(recipe))
    set_precision(family, recipe)
    if not is_base_of(family.folder, info.base_hash):
        raise BadInput(
            f"the base {recipe.base.source!r} is not the one that {folder.path} was trained on (its content changed): "
            "restore the old base, or train again"
        )
    recipe.method.add_subject_token(family, recipe.data.token, recipe.data.class_noun)
    parameters = recipe.method.attach(family, recipe.run.seed)
    if state is None:
        recipe.method.load_state_dict(family, result)
    else:
        _take_state(recipe, parameters, state)
    family.parts.to(device)
    return family, info


def _take_state(recipe: Recipe, parameters: Mapping[str, nn.Parameter], state: State) -> None:
    """What would leave a run that ended here, as the trainer takes it: the optimiser's average, then the EMA."""
    copy_into(parameters, state.trained)
    if recipe.optim.averages:
        optimizer = recipe.optim.build(parameters, recipe.method.windows(parameters))
        load_state_tensors(optimizer, state.optimizer, state.values.get("optimizer", {}))
        recipe.optim.to_result(optimizer)
    copy_into(parameters, state.ema)


def open_exported(
    folder: RunFolder, exported: Sequence[Exported], dtype: torch.dtype, bench: Bench | None = None
) -> Family | None:
    """Opens the first export that passed its checks, as another program would: on an unchanged base, in `dtype`.

    `bench`: where they were checked, which may still hold such a base. It holds none afterwards.

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
        if bench is not None:
            bench.close()
        return export.open(item.path, base, dtype)
    family, method, data = bench.take() if bench else base.load(dtype), folder.recipe.method, folder.recipe.data
    method.add_subject_token(family, data.token, data.class_noun)
    _read_words(family, exported)
    if isinstance(export, NativeExport):
        open_native(export, item.path, family)
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
