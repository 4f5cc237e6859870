"""What a run or an adapter file holds, loaded again: for sampling and for exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import __version__, families
from finetune.config import ExportTo, dump_recipe
from finetune.errors import BadInput
from finetune.export import (
    CHECKPOINT,
    DTYPES,
    EMBEDDING,
    FOLDER,
    REGISTRY,
    Adapter,
    Bench,
    Exported,
    adapter_from,
    apply_adapter,
    check_formats,
    embedding_usage,
    export_adapter,
    export_checkpoint,
    export_embedding,
    export_folder,
    formats_for,
    read_embedding,
)
from finetune.export.base import discard
from finetune.export.card import Card, licence_of, model_card, sidecar
from finetune.export.inspection import open_adapter
from finetune.export.metadata import written_date
from finetune.export.reduced import export_own_form, own_formats, reduced, with_checks
from finetune.families.base import Family
from finetune.files import write_json, write_text
from finetune.loop import resolve_precision
from finetune.methods.peft_adapter import PeftAdapter, read_own_form
from finetune.methods.textual_inversion import Inversion, embeddings, set_embeddings
from finetune.run import RunFolder


def open_result(
    source: Path, base: str = "tiny", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Family, dict[str, Any]]:
    """A family with a finished run's training in it, in the run's precision, or an adapter file merged into `base` in
    `dtype`; and run.json's content.

    Raises:
        BadInput: neither a finished run nor an adapter for that base.
    """
    if (source / "recipe.yaml").is_file():
        return open_run(RunFolder(source), device)
    adapter, _ = open_adapter(source, base)
    family = families.load(base, dtype=dtype)
    family.to(device)
    apply_adapter(family, adapter)
    return family, {}


def open_run(folder: RunFolder, device: str | torch.device = "cpu") -> tuple[Family, dict[str, Any]]:
    """A family with the run's training in it, in the precision in which the run held it; and run.json's content.

    Raises:
        BadInput: the run is not finished, or the base is not its base any more.
    """
    recipe, info = folder.recipe, folder.info
    trained = folder.result()
    precision = DTYPES[resolve_precision(recipe.run)]
    family = recipe.base.load(recipe.method.weight_dtype(precision))
    family.autocast = recipe.method.autocast_dtype(precision)
    if families.base_hash(family.folder) != info.get("base_hash"):
        raise BadInput(
            f"the base {recipe.base.source!r} is not the one that {folder.path} was trained on (its content changed): "
            "give the old one back, or train again"
        )
    recipe.method.name_subject(family, recipe.data.token, recipe.data.class_noun)
    recipe.method.attach(family, recipe.run.seed)
    recipe.method.load_state_dict(family, trained)
    family.to(device)
    return family, info


def export_run(
    folder: RunFolder, family: Family, formats: Sequence[str] = (), options: ExportTo | None = None
) -> list[Exported]:
    """Writes RUN/exports/ from a family with the run's training in it, checks every file, and notes it all in
    RUN/exports.json. Without `formats`: those of `options` (None: the recipe's), or all that are usual for what was
    trained. The checks run where the family is, and in its precision. The family is used up: its parts leave memory,
    since the checks load a clean base."""
    recipe = folder.recipe
    options, leaves = options or recipe.export, recipe.method.leaves
    chosen = list(formats or options.formats) or formats_for(leaves, usual=True)
    check_formats(chosen, leaves)
    target, name = folder.path / "exports", recipe.run.name
    bench = Bench.of(family, recipe.base.load)
    rows = {part: value.cpu() for part, value in embeddings(family).items()}
    whole = [item for item in chosen if item in (FOLDER, CHECKPOINT)]
    exported = [_whole_model(family, target, name, item, options.dtype, about_run(folder)) for item in whole]
    exported += _as_lora(folder, family, [item for item in chosen if item in REGISTRY], options, bench)
    discard(family)
    if EMBEDDING in chosen:
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
    plain, own_form = own_formats(method, formats)
    exported: dict[str, Exported] = {}
    if isinstance(method, PeftAdapter) and own_form:
        path = REGISTRY["peft"].path(folder.path / "exports", name, family.name)
        exported["peft"] = export_own_form(method, family, path, own.prediction, bench)
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
    path = folder.path / "exports" / f"{recipe.run.name}{'-embedding' * (len(recipe.method.leaves) > 1)}.safetensors"
    about = about_run(folder)
    about |= {"trigger_phrase": path.stem if about["trigger_phrase"] else ""}
    words = recipe.method.init or recipe.data.class_noun or ""
    return export_embedding(recipe.method, rows, family, path, options.dtype, about, words, bench)


def _whole_model(family: Family, target: Path, name: str, wanted: str, dtype: str, about: dict[str, str]) -> Exported:
    if wanted == FOLDER:
        return export_folder(family, target / f"{name}-model", dtype)
    return export_checkpoint(family, target / f"{name}.safetensors", dtype, about)


def about_run(folder: RunFolder) -> dict[str, str]:
    """What exports say of themselves, by `export.metadata`; paths and captions only where "full" is asked for."""
    recipe, info = folder.recipe, folder.info
    side = info["resolution"]
    needed = {"title": recipe.run.name, "resolution": f"{side}x{side}", "trigger_phrase": "", "date": ""}
    if recipe.export.metadata == "minimal":
        return needed
    standard = {
        "title": recipe.run.name,
        "resolution": f"{side}x{side}",
        "trigger_phrase": trigger(info),
        "base_hash": info["base_hash"],
        "steps": str(recipe.run.steps),
        "seed": str(recipe.run.seed),
        "version": __version__,
        **_date(folder),
    }
    if recipe.export.metadata == "standard":
        return standard
    captions = list(dict.fromkeys(text for texts in info["captions"] for text in texts))
    return standard | {"recipe": dump_recipe(recipe), "captions": json.dumps(captions, ensure_ascii=False)}


def _date(folder: RunFolder) -> dict[str, str]:
    """When the training ended, so that an export that is made again is the same file; nothing during the training,
    where the files of previews are of now."""
    file = folder.path / "adapter" / "trained.safetensors"
    if not file.is_file():
        return {}
    return {"date": written_date(datetime.fromtimestamp(file.stat().st_mtime, UTC))}


def trigger(info: dict[str, Any]) -> str:
    """What calls the subject in a prompt: "zwx mug"; of several "zwx mug, vtx dog"."""
    return ", ".join(names(info))


def names(info: dict[str, Any]) -> list[str]:
    """What calls each subject, from run.json's content."""
    return [
        " ".join(text for text in (subject.get("token"), subject.get("class_noun")) if text)
        for subject in info.get("subjects") or [info]
    ]


def _merged(run: Path, exported: Sequence[Exported]) -> list[dict[str, Any]]:
    """What exports.json lists, with paths inside the run folder: the new files, and older ones of other formats that
    are still there."""
    file = run / "exports.json"
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    new = [asdict(item) | {"path": item.path.relative_to(run).as_posix()} for item in exported]
    formats = {item["format"] for item in new}
    return [item for item in old if item["format"] not in formats and (run / item["path"]).exists()] + new


def open_exported(folder: RunFolder, exported: Sequence[Exported], dtype: torch.dtype) -> Family | None:
    """What a user of the first good export gets: the file on a clean base, or the whole model. None: none is good."""
    item = next((item for item in exported if item.ok), None)
    if item is None:
        return None
    base = folder.recipe.base
    if item.format == FOLDER:
        return families.load(str(item.path), dtype=dtype)
    if item.format == CHECKPOINT:
        like = families.resolve(base.source, base.revision, base.like)
        return families.load(str(item.path), dtype=dtype, like=str(like))
    family, method, data = base.load(dtype), folder.recipe.method, folder.recipe.data
    words = next((item for item in exported if item.ok and item.format == EMBEDDING), None)
    method.name_subject(family, data.token, data.class_noun)
    if words is not None:
        set_embeddings(family, read_embedding(words.path, family.name))
    if item is words:
        return family
    if item.format == "peft" and method.is_adapter and not method.adapter.low_rank:
        read_own_form(family, item.path)
        return family
    apply_adapter(family, open_adapter(item.path, str(family.folder))[0])
    return family


def write_companions(folder: RunFolder) -> None:
    """Beside the exports: README.md with pictures, and for a file that UIs list, NAME.json and NAME.png."""
    target, card = folder.path / "exports", _card(folder)
    for number, (_, url) in enumerate(card.pictures):
        (target / url).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder.path / "samples" / "after" / _first_picture(folder, number), target / url)
    write_text(target / "README.md", model_card(card))
    if (target / f"{card.title}.safetensors").is_file():
        write_json(target / f"{card.title}.json", sidecar(card))
        if card.pictures:
            shutil.copy(target / card.pictures[0][1], target / f"{card.title}.png")


def _card(folder: RunFolder) -> Card:
    recipe, info = folder.recipe, folder.info
    listed = json.loads((folder.path / "exports.json").read_text(encoding="utf-8"))
    base = families.resolve(recipe.base.source, recipe.base.revision, recipe.base.like)
    prompts = info["prompts"] if (folder.path / "samples" / "after").is_dir() else []
    settings = {
        "method": recipe.method.kind,
        "steps": f"{recipe.run.steps} of {recipe.run.batch_size}",
        "learning rate": f"{recipe.optim.lr:g}",
        "resolution": str(info["resolution"]),
        "prior preservation": recipe.prior.kind,
        "seed": str(recipe.run.seed),
        "base hash": info["base_hash"][:16],
    }
    whole = any(item["format"] in (FOLDER, CHECKPOINT) for item in listed)
    words = next((Path(item["path"]).name for item in listed if item["format"] == EMBEDDING), None)
    return Card(
        title=recipe.run.name if whole or recipe.method.is_adapter else f"{recipe.run.name}-lora",
        trigger=trigger(info),
        activation=trigger(info | ({"token": Path(words).stem} if words else {})),
        loading=embedding_usage(info["family"], words, info["token"]) if words else [],
        family=info["family"],
        base=short_name(recipe.base.source),
        licence=licence_of(base),
        holds=recipe.method.leaves if whole or recipe.method.is_adapter else ("adapter",),
        settings=settings,
        pictures=[(prompt, f"images/{number:02d}.png") for number, prompt in enumerate(prompts)],
        files=[
            f"`{Path(item['path']).relative_to('exports').as_posix()}` ({item['format']}): {'; '.join(item['checks'])}"
            for item in listed
        ],
    )


def _first_picture(folder: RunFolder, prompt: int) -> str:
    return min(file.name for file in (folder.path / "samples" / "after").glob(f"{prompt:02d}-*.png"))


def short_name(source: str) -> str:
    """A base as it may be told to others: a folder's last name."""
    return Path(source).name if Path(source).is_absolute() or Path(source).exists() else source
