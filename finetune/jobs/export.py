"""A run's exports: written, checked, and noted in RUN/exports.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.core.files import write_json
from finetune.export.adapter import adapter_from, export_adapter
from finetune.export.base import Adapter, Bench, Exported, discard
from finetune.export.embedding import NAME, export_embedding
from finetune.export.model.checkpoint import export_checkpoint
from finetune.export.model.folder import export_folder
from finetune.export.registry import CHECKPOINT, EXPORTS, FOLDER, check_formats, formats_for
from finetune.export.settings import ExportTo
from finetune.export.svd import export_native_form, native_formats, reduced, with_checks
from finetune.families.base import Family
from finetune.methods.embeddings import embeddings
from finetune.methods.peft_adapter import PeftAdapter
from finetune.methods.textual_inversion import Inversion
from finetune.runs.about import about_run
from finetune.runs.exports import read_exports
from finetune.runs.folder import RunFolder


def export_run(
    folder: RunFolder, family: Family, formats: Sequence[str] = (), options: ExportTo | None = None
) -> list[Exported]:
    """Writes RUN/exports/ from a family with the run's training in it, checks every file, and notes it all in
    RUN/exports.json. Without `formats`: those of `options` (None: the recipe's), or all that are usual for what was
    trained. The checks run where the family is, and in its precision. The family is used up: its parts leave memory,
    since the checks load a clean base."""
    recipe = folder.recipe
    options, artifacts = options or recipe.export, recipe.method.artifacts
    chosen = list(formats or options.formats) or formats_for(artifacts, usual=True)
    check_formats(chosen, artifacts)
    target, name = folder.path / "exports", recipe.run.name
    bench = Bench.of(family, recipe.base.load, options.verify)
    rows = {part: value.cpu() for part, value in embeddings(family).items()}
    whole = [item for item in chosen if item in (FOLDER, CHECKPOINT)]
    exported = [_whole_model(family, target, name, item, options, about_run(folder)) for item in whole]
    exported += _as_lora(folder, family, [item for item in chosen if item in EXPORTS], options, bench)
    discard(family)
    if NAME in chosen:
        exported.append(_embedding(folder, rows, family, options, bench))
    write_json(folder.path / "exports.json", _merged(folder.path, exported))
    return exported


def _as_lora(
    folder: RunFolder, family: Family, formats: Sequence[str], options: ExportTo, bench: Bench
) -> list[Exported]:
    """The adapter that was trained, or what comes nearest to what was trained."""
    method = folder.recipe.method.adapter
    if not formats:
        return []
    if not method.low_rank:
        return _reduced(folder, family, formats, options, bench)
    adapter = adapter_from(method, family)
    discard(family)
    return _lora(folder, adapter, folder.recipe.run.name, formats, options, family, bench)


def _lora(
    folder: RunFolder,
    adapter: Adapter,
    name: str,
    formats: Sequence[str],
    options: ExportTo,
    family: Family,
    bench: Bench,
) -> list[Exported]:
    about = about_run(folder)
    method = folder.recipe.method
    if not method.adapter.low_rank and options.metadata != "minimal":
        about |= {"method": method.kind}
    v_prediction = family.schedule.prediction == "v_prediction"
    target = folder.path / "exports"
    return export_adapter(adapter, target, name, formats, options.dtype, about, bench, v_prediction, force=True)


def _reduced(
    folder: RunFolder, family: Family, formats: Sequence[str], options: ExportTo, bench: Bench
) -> list[Exported]:
    """What is no LoRA, as one, and in PEFT's own form where there is one."""
    recipe = folder.recipe
    method, name = recipe.method, recipe.run.name
    own = reduced(method, family, bench, options.rank, options.max_error)
    plain, native_form = native_formats(method, formats)
    exported: dict[str, Exported] = {}
    if isinstance(method, PeftAdapter) and native_form:
        path = EXPORTS["peft"]().path(folder.path / "exports", name, family.name)
        exported["peft"] = export_native_form(method, family, path, own.prediction, bench)
    discard(family)
    lora_name = name if method.is_adapter else f"{name}-lora"  # NAME.safetensors is a whole model's
    for item in _lora(folder, own.adapter, lora_name, plain, options, family, bench):
        exported[item.format] = with_checks(item, own, bench)
    return [exported[item] for item in formats]


def _embedding(
    folder: RunFolder, rows: dict[str, Tensor], family: Family, options: ExportTo, bench: Bench
) -> Exported:
    """UIs take the file's name for the word; NAME.safetensors is the LoRA's if there is one."""
    recipe = folder.recipe
    assert isinstance(recipe.method, Inversion)
    path = (
        folder.path / "exports" / f"{recipe.run.name}{'-embedding' * (len(recipe.method.artifacts) > 1)}.safetensors"
    )
    about = about_run(folder)
    about |= {"trigger_phrase": path.stem if about["trigger_phrase"] else ""}
    words = recipe.method.init or recipe.data.class_noun or ""
    return export_embedding(recipe.method, rows, family, path, options.dtype, about, words, bench)


def _whole_model(
    family: Family, target: Path, name: str, wanted: str, options: ExportTo, about: dict[str, str]
) -> Exported:
    if wanted == FOLDER:
        return export_folder(family, target / f"{name}-model", options.dtype, options.verify)
    return export_checkpoint(family, target / f"{name}.safetensors", options.dtype, about, options.verify)


def _merged(run: Path, exported: Sequence[Exported]) -> list[dict[str, Any]]:
    """What exports.json lists, with paths inside the run folder: the new files, and older ones of other formats that
    are still there."""
    old = read_exports(run)
    new = [_listed(item, run) for item in exported]
    formats = {item["format"] for item in new}
    return [item for item in old if item["format"] not in formats and (run / item["path"]).exists()] + new


def _listed(item: Exported, run: Path) -> dict[str, Any]:
    """`results` is for programs; `checks` has the same as lines, as ever, for whoever reads those."""
    lines, results = [check.line for check in item.checks], [check.values() for check in item.checks]
    return asdict(item) | {"path": item.path.relative_to(run).as_posix(), "checks": lines, "results": results}
