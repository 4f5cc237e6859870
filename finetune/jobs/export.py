"""Writes a run's exports, checks them, and lists them in RUN/exports.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.config.recipe import Recipe
from finetune.core.files import write_json
from finetune.export.adapter import adapter_from, export_adapter
from finetune.export.base import (
    Bench,
    EmbeddingExport,
    Exported,
    ModelExport,
    NewWords,
    Request,
    discard,
)
from finetune.export.lora.peft import Peft
from finetune.export.registry import (
    EXPORTS,
    adapter_exports,
    check_formats,
    embedding_exports,
    formats_for,
    model_exports,
)
from finetune.export.settings import ExportTo
from finetune.export.svd import export_native_form, native_formats, reduced, with_checks
from finetune.families.base import Family
from finetune.methods.embeddings import embeddings
from finetune.methods.peft_adapter import PeftAdapter
from finetune.methods.textual_inversion import Inversion
from finetune.runs.about import about_run
from finetune.runs.exports import read_exports
from finetune.runs.folder import RunFolder


@dataclass(frozen=True)
class _Call:
    """The arguments of one call of `export_run`."""

    folder: RunFolder
    family: Family
    options: ExportTo
    bench: Bench

    @property
    def recipe(self) -> Recipe:
        return self.folder.recipe

    def request(self, name: str, **more: str) -> Request:
        """`more` adds to, or replaces, the metadata that every export of the run carries."""
        v_prediction = self.family.schedule.prediction == "v_prediction"
        about = about_run(self.folder) | more
        return Request(self.folder.path / "exports", name, self.options.dtype, about, v_prediction, force=True)


def export_run(
    folder: RunFolder, family: Family, formats: Sequence[str] = (), options: ExportTo | None = None
) -> list[Exported]:
    """Writes the exports of a run to RUN/exports, checks every file, and lists them in RUN/exports.json.

    Args:
        folder: the run.
        family: the base with the trained weights of the run. It can't be used afterwards: its parts are removed from
            memory, because the checks load an unchanged base.
        formats: what to write. If empty: the formats of `options`, or else the usual ones for what was trained.
        options: the export settings; None for those of the recipe.

    The checks run on the family's device and in its precision.

    Returns:
        One record for each written file, with its checks. A failed check does not raise: see `Exported.ok`.

    Raises:
        BadInput: a format does not fit what was trained, or a conversion exceeds `max_error`.
        OSError: a file can't be written.
    """
    recipe = folder.recipe
    options, artifacts = options or recipe.export, recipe.method.artifacts
    chosen = list(formats or options.formats) or formats_for(artifacts, usual=True)
    check_formats(chosen, artifacts)
    call = _Call(folder, family, options, Bench.of(family, recipe.base.load, options.verify))
    rows = {part: value.cpu() for part, value in embeddings(family).items()}
    exported = [_whole_model(call, item) for item in model_exports(chosen)]
    exported += _as_lora(call, [item.name for item in adapter_exports(chosen)])
    discard(family)
    exported += [_embedding(call, rows, item) for item in embedding_exports(chosen)]
    write_json(folder.path / "exports.json", _merged(folder.path, exported))
    return exported


def _whole_model(call: _Call, export: ModelExport) -> Exported:
    request = call.request(call.recipe.run.name)
    path = export.path(request.folder, request.name, call.family.name)
    return export.export(call.family, path, request, call.options.verify)


def _as_lora(call: _Call, formats: Sequence[str]) -> list[Exported]:
    """Exports the trained adapter, or the LoRA nearest to the trained weights."""
    method = call.recipe.method.adapter
    if not formats:
        return []
    if not method.low_rank:
        return _reduced(call, formats)
    adapter = adapter_from(method, call.family)
    discard(call.family)
    return export_adapter(adapter, call.request(call.recipe.run.name), formats, call.bench)


def _reduced(call: _Call, formats: Sequence[str]) -> list[Exported]:
    """Exports weights that are not a LoRA: converted to one, and in PEFT's own format if it has one."""
    method, name, family = call.recipe.method, call.recipe.run.name, call.family
    own = reduced(method, family, call.bench, call.options.rank, call.options.max_error)
    plain, native_form = native_formats(method, formats)
    exported: dict[str, Exported] = {}
    if isinstance(method, PeftAdapter) and native_form:
        path = EXPORTS[Peft.name]().path(call.folder.path / "exports", name, family.name)
        exported[Peft.name] = export_native_form(method, family, path, own.prediction, call.bench)
    discard(family)
    lora_name = name if method.is_adapter else f"{name}-lora"  # NAME.safetensors is the whole model
    request = call.request(lora_name, **({} if call.options.metadata == "minimal" else {"method": method.kind}))
    for item in export_adapter(own.adapter, request, plain, call.bench):
        exported[item.format] = with_checks(item, own, call.bench)
    return [exported[item] for item in formats]


def _embedding(call: _Call, rows: dict[str, Tensor], export: EmbeddingExport) -> Exported:
    """UIs use the file's name as the word in prompts. If there is also a LoRA, NAME.safetensors is the LoRA."""
    recipe = call.recipe
    assert isinstance(recipe.method, Inversion)
    name = f"{recipe.run.name}{'-embedding' * (len(recipe.method.artifacts) > 1)}"
    request = call.request(name)
    about = request.about | {"trigger_phrase": name if request.about["trigger_phrase"] else ""}
    words = NewWords(recipe.method, rows, recipe.method.init or recipe.data.class_noun or "")
    return export.export(words, call.family, replace(request, about=about), call.bench)


def _merged(run: Path, exported: Sequence[Exported]) -> list[dict[str, Any]]:
    """The entries of exports.json: the new files, and older files of other formats that still exist."""
    old = read_exports(run)
    new = [_listed(item, run) for item in exported]
    formats = {item["format"] for item in new}
    return [item for item in old if item["format"] not in formats and (run / item["path"]).exists()] + new


def _listed(item: Exported, run: Path) -> dict[str, Any]:
    """An entry of exports.json. `results` are the checks for programs; `checks` are the same as lines of text."""
    lines, results = [check.line for check in item.checks], [check.values() for check in item.checks]
    return asdict(item) | {"path": item.path.relative_to(run).as_posix(), "checks": lines, "results": results}
