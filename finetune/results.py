"""What a run or an adapter file holds, loaded again: for sampling and for exports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from finetune import families
from finetune.errors import BadInput
from finetune.export import (
    FOLDER,
    REGISTRY,
    Exported,
    adapter_from,
    apply_adapter,
    check_formats,
    export_adapter,
    export_checkpoint,
    export_folder,
    read_adapter,
)
from finetune.families.base import Family
from finetune.files import write_json
from finetune.run import RunFolder


def open_result(source: Path, base: str = "tiny", device: str | torch.device = "cpu") -> tuple[Family, dict[str, Any]]:
    """A family with a finished run's training in it, or an adapter file merged into `base`; and run.json's content.

    Raises:
        BadInput: neither a finished run nor an adapter for that base.
    """
    if (source / "recipe.yaml").is_file():
        family, info = open_run(RunFolder(source))
    else:
        family, info = families.load(base), {}
        apply_adapter(family, read_adapter(source, family.name, family.folder))
    family.to(device)
    return family, info


def open_run(folder: RunFolder) -> tuple[Family, dict[str, Any]]:
    recipe, info = folder.recipe, folder.info
    trained = folder.result()
    family = families.load(recipe.base.source, recipe.base.revision, like=recipe.base.like)
    if families.base_hash(family.folder) != info.get("base_hash"):
        raise BadInput(
            f"the base {recipe.base.source!r} is not the one that {folder.path} was trained on (its content changed): "
            "give the old one back, or train again"
        )
    recipe.method.attach(family, recipe.run.seed)
    recipe.method.load_state_dict(family, trained)
    return family, info


def export_run(folder: RunFolder, family: Family, formats: Sequence[str] = ()) -> list[Exported]:
    """Writes RUN/exports/ from a family with the run's training in it, checks every file, and notes it all in
    exports.json. Without `formats`: all that can hold what was trained. A family under an adapter is used up: its
    parts leave memory, since the checks load a clean base."""
    recipe = folder.recipe
    target, name = folder.path / "exports", recipe.run.name
    if recipe.method.is_adapter:
        adapter = adapter_from(recipe.method, family)
        family.release(list(family.parts))
        exported = export_adapter(
            adapter,
            target,
            name,
            formats or recipe.export.formats or list(REGISTRY),
            recipe.export.dtype,
            _about(folder),
            v_prediction=family.schedule.prediction == "v_prediction",
            force=True,
        )
    else:
        check_formats(formats or recipe.export.formats, is_adapter=False)
        wanted = formats or recipe.export.formats or [FOLDER]
        exported = [_whole_model(family, target, name, item, recipe.export.dtype, _about(folder)) for item in wanted]
    write_json(target / "exports.json", _merged(folder.path, exported))
    return exported


def _whole_model(family: Family, target: Path, name: str, wanted: str, dtype: str, about: dict[str, str]) -> Exported:
    if wanted == FOLDER:
        return export_folder(family, target / f"{name}-model", dtype)
    return export_checkpoint(family, target / f"{name}.safetensors", dtype, about)


def _about(folder: RunFolder) -> dict[str, str]:
    """What exports say of themselves: no paths, no captions, no names of files."""
    recipe, info = folder.recipe, folder.info
    return {
        "title": recipe.run.name,
        "trigger_phrase": " ".join(text for text in (info["token"], info["class_noun"]) if text),
        "resolution": f"{info['resolution']}x{info['resolution']}",
        "base_hash": info["base_hash"],
        "steps": str(recipe.run.steps),
        "seed": str(recipe.run.seed),
    }


def _merged(run: Path, exported: Sequence[Exported]) -> list[dict[str, Any]]:
    """What exports.json lists, with paths inside the run folder: the new files, and older ones of other formats that
    are still there."""
    file = run / "exports" / "exports.json"
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    new = [asdict(item) | {"path": str(item.path.relative_to(run))} for item in exported]
    formats = {item["format"] for item in new}
    return [item for item in old if item["format"] not in formats and (run / item["path"]).exists()] + new
