"""Writes a run's exports, checks them, and lists them in RUN/exports.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.config.load import changed_recipe
from finetune.config.recipe import Recipe
from finetune.core.devices import machine
from finetune.core.errors import BadInput
from finetune.core.events import one_step
from finetune.core.logging import quieted
from finetune.export.adapter import adapter_from, export_adapter
from finetune.export.base import EmbeddingExport, Exported, ModelExport, NativeExport, NewWords, Request
from finetune.export.bench import Bench, discard
from finetune.export.lora.peft import Peft
from finetune.export.metadata import written_date
from finetune.export.native import export_native, trained_prediction, with_prediction
from finetune.export.registry import (
    EXPORTS,
    adapter_exports,
    check_formats,
    embedding_exports,
    formats_for,
    model_exports,
    native_exports,
)
from finetune.export.settings import ExportTo
from finetune.export.svd import export_native_form, native_formats, reduced, with_checks
from finetune.families.base import Family
from finetune.jobs.companions import write_companions
from finetune.jobs.open import open_run
from finetune.methods.embeddings import embeddings
from finetune.methods.peft_adapter import PeftAdapter
from finetune.methods.textual_inversion import Inversion
from finetune.report.html import write_report
from finetune.runs.about import about_run
from finetune.runs.exports import read_exports, write_exports
from finetune.runs.folder import RunFolder


@dataclass(frozen=True)
class ExportPlace:
    """Where what leaves a run is written, and what it is called.

    step: of the checkpoint that leaves; None: the result.
    out: a folder; None: RUN/exports, of a checkpoint RUN/exports/step-000250.
    """

    run: RunFolder
    step: int | None = None
    out: Path | None = None

    @property
    def _stem(self) -> str:
        return "" if self.step is None else f"step-{self.step:06d}"

    @property
    def folder(self) -> Path:
        return self.out or self.run.path / "exports" / self._stem

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.run.recipe.run.name, self._stem) if part)

    @property
    def of_the_run(self) -> bool:
        """Whether these are the run's own exports, which its page and card tell of."""
        return self.out is None and self.step is None

    @property
    def listing(self) -> Path:
        """The file that lists what was written: RUN/exports.json, or one beside the files."""
        return (self.run.path if self.of_the_run else self.folder) / "exports.json"

    def about(self, metadata: str) -> dict[str, str]:
        """What every export says of the run, with the checkpoint's own step and date; `metadata` says how much."""
        told = about_run(self.run, metadata) | {"title": self.name}
        if self.step is None:
            return told
        date = {"date": written_date(self.run.checkpoints.date(self.step))} if told.get("date") != "" else {}
        return told | date | ({"steps": str(self.step)} if "steps" in told else {})


@dataclass(frozen=True)
class _Call:
    """One call of `export_run`: what is exported, where to, and how."""

    place: ExportPlace
    family: Family
    options: ExportTo
    bench: Bench

    @property
    def folder(self) -> RunFolder:
        return self.place.run

    @property
    def recipe(self) -> Recipe:
        return self.folder.recipe

    def request(self, name: str, **more: str) -> Request:
        """`more` adds to, or replaces, the metadata that every export of the run carries."""
        v_prediction = self.family.schedule.prediction == "v_prediction"
        about = self.place.about(self.options.metadata) | more
        return Request(self.place.folder, name, self.options.dtype, about, v_prediction, force=True)


def export_run(
    folder: RunFolder,
    family: Family,
    formats: Sequence[str] = (),
    options: ExportTo | None = None,
    *,
    place: ExportPlace | None = None,
    bench: Bench | None = None,
) -> list[Exported]:
    """Writes `place` (None: RUN/exports/) from a family with the run's training in it, checks every file, and notes it
    all in exports.json (`ExportPlace.listing`). Without `formats`: those of `options` (None: the recipe's), or all
    that are usual for what was trained. The checks run where the family is, and in its precision. The family is used
    up: its parts leave memory, since the checks load a clean base. `bench` (None: a new one) may still hold it
    afterwards."""
    recipe, place = folder.recipe, place or ExportPlace(folder)
    options, artifacts = options or recipe.export, recipe.method.artifacts
    chosen = list(formats or options.formats) or formats_for(artifacts, usual=True)
    check_formats(chosen, artifacts)
    earlier = _earlier(place)  # before anything is written: it may be damaged
    call = _Call(place, family, options, bench or Bench.of(family, recipe.base.load, options.verify))
    rows = {part: value.cpu() for part, value in embeddings(family).items()}
    exported = [_whole_model(call, item) for item in model_exports(chosen)]
    native = _native(call, native_exports(chosen))
    exported += _as_lora(call, [item.name for item in adapter_exports(chosen)])
    discard(family)
    exported += [finish() for finish in native]
    exported += [_embedding(call, rows, item) for item in embedding_exports(chosen)]
    if bench is None:
        call.bench.close()
    write_exports(place.listing, _merged(place, exported, earlier))
    return exported


@quieted()
def export_result(
    run: Path | str,
    formats: Sequence[str] = (),
    *,
    step: int | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
) -> list[Exported]:
    """Writes a run's result, or one of its checkpoints, as files for other programs, and checks every file.

    Args:
        formats: kohya, diffusers, peft, folder, checkpoint or embedding; none: those of the run's recipe.
        step: of a checkpoint; None: the result, or the newest checkpoint of an unfinished run.
        out: a folder; None: RUN/exports. There, the model card and the page are written too.
        overrides: of the recipe's export settings, such as "export.rank=8".

    Raises:
        BadInput: this is no run, a format does not fit it, there is no such checkpoint, or an override is of
            something else than the export.
    """
    folder = RunFolder(Path(run))
    recipe = changed_recipe(folder.recipe, overrides)
    own = changed_recipe(folder.recipe, ())
    if recipe.model_copy(update={"export": own.export}) != own:
        raise BadInput(f"the overrides {overrides!r:.200} change the training, which is over: give those of export.*")
    check_formats(formats, recipe.method.artifacts)
    if out is None:
        folder.refuse_work()
    place = ExportPlace(folder, folder.step_to_open(step), out)
    family, _ = open_run(folder, machine()[0], step if place.step is None else place.step)
    exported = export_run(folder, family, formats, recipe.export, place=place)
    if place.of_the_run:
        write_companions(folder)
        write_report(folder.path)
    return exported


def _whole_model(call: _Call, export: ModelExport) -> Exported:
    request = call.request(call.place.name)
    path = export.path(request.folder, request.name, call.family.name)
    with one_step(f"Export {export.name}"):
        return export.export(call.family, path, request, call.options.verify)


def _native(call: _Call, exports: Sequence[NativeExport]) -> list[Callable[[], Exported]]:
    """Writes other kinds of adapters in their own form. Each returned function completes the checks on a clean base,
    and is to be called when the trained family has left memory."""
    method, family = call.recipe.method, call.family
    if not exports:
        return []
    assert isinstance(method, PeftAdapter)
    prediction, request = trained_prediction(family), call.request(call.place.name)
    checked = call.bench.verify != "off"
    return [
        partial(with_prediction, export_native(item, method, family, request, checked), item, prediction, call.bench)
        for item in exports
    ]


def _as_lora(call: _Call, formats: Sequence[str]) -> list[Exported]:
    """Exports the trained adapter, or the LoRA nearest to the trained weights."""
    method = call.recipe.method.adapter
    if not formats:
        return []
    if not method.low_rank:
        return _reduced(call, formats)
    adapter = adapter_from(method, call.family)
    discard(call.family)
    return export_adapter(adapter, call.request(call.place.name), formats, call.bench)


def _reduced(call: _Call, formats: Sequence[str]) -> list[Exported]:
    """What is no LoRA, as one, and in PEFT's own form where there is one."""
    method, name, family = call.recipe.method, call.place.name, call.family
    own = reduced(method, family, call.bench, call.options.rank, call.options.max_error)
    plain, native_form = native_formats(method, formats)
    exported: dict[str, Exported] = {}
    if isinstance(method, PeftAdapter) and native_form:
        path = EXPORTS[Peft.name]().path(call.place.folder, name, family.name)
        with one_step(f"Export {Peft.name}"):
            exported[Peft.name] = export_native_form(method, family, path, own.prediction, call.bench)
    discard(family)
    lora_name = name if method.is_adapter else f"{name}-lora"  # NAME.safetensors is the whole model
    request = call.request(lora_name, **({} if call.options.metadata == "minimal" else {"method": method.kind}))
    written = export_adapter(own.adapter, request, plain, call.bench)
    exported |= {item.format: item for item in with_checks(written, own, call.bench)}
    return [exported[item] for item in formats]


def _embedding(call: _Call, rows: dict[str, Tensor], export: EmbeddingExport) -> Exported:
    """UIs use the file's name as the word in prompts. If there is also a LoRA, NAME.safetensors is the LoRA."""
    recipe = call.recipe
    assert isinstance(recipe.method, Inversion)
    name = f"{call.place.name}{'-embedding' * (len(recipe.method.artifacts) > 1)}"
    request = call.request(name)
    about = request.about | {"trigger_phrase": name if request.about["trigger_phrase"] else ""}
    words = NewWords(recipe.method, rows, recipe.method.init or recipe.data.class_noun or "")
    with one_step(f"Export {export.name}"):
        return export.export(words, call.family, replace(request, about=about), call.bench)


def _earlier(place: ExportPlace) -> list[dict[str, Any]]:
    """What was exported there before."""
    return read_exports(place.run.path, place.listing) if place.out is None else []


def _merged(place: ExportPlace, exported: Sequence[Exported], old: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What exports.json lists: the new files, and older ones of other formats that are still there."""
    run = place.run.path
    inside = place.out is None
    root = run if inside else place.folder
    new = [_listed(item, root) for item in exported]
    formats, paths = {item["format"] for item in new}, {item["path"] for item in new}
    kept = [item for item in old if item["format"] not in formats and item["path"] not in paths]
    return [item for item in kept if (root / item["path"]).exists()] + new


def _listed(item: Exported, root: Path) -> dict[str, Any]:
    """`results` is for programs; `checks` has the same as lines, as ever, for whoever reads those."""
    lines, results = [check.line for check in item.checks], [check.values() for check in item.checks]
    return asdict(item) | {"path": item.path.relative_to(root).as_posix(), "checks": lines, "results": results}
