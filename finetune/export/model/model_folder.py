"""Writes a fully fine-tuned model as a complete diffusers folder, and loads it again as a check."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from finetune.core.devices import DTYPES, gib
from finetune.core.files import copy_plain, load_tensors, replacing_folder, save_tensors, write_json
from finetune.core.reading import read_json
from finetune.core.records import Check
from finetune.export.base import Exported, ModelExport, Request, unchecked
from finetune.export.decompose import loaded_part, unloaded
from finetune.export.settings import Verify
from finetune.families.base import Family
from finetune.families.configs import read_config
from finetune.families.naming.clip import strip_text_model
from finetune.families.registry import family_of
from finetune.families.settings import Base
from finetune.families.source import load_family


class Folder(ModelExport):
    name = "folder"

    def path(self, folder: Path, name: str, family: str) -> Path:
        return folder / f"{name}-model"

    def export(self, family: Family, path: Path, request: Request, verify: Verify) -> Exported:
        return export_folder(family, path, request.dtype, verify)

    def open(self, path: Path, base: Base, dtype: torch.dtype) -> Family:
        return load_family(str(path), dtype=dtype)

    def checking(self, parts: Mapping[str, float], verify: Verify) -> str:
        if verify == "deltas":
            return ""
        return (
            f"one part at a time ({gib(max(parts.values()))} at most) in main memory, in addition to the trained model"
        )


def export_folder(family: Family, path: Path, dtype: str, verify: Verify = "full") -> Exported:
    """Writes `path` in `dtype` (replacing an older export), loads it again and compares every weight."""
    with replacing_folder(path) as temporary:
        family.drawing.pipeline().save_pretrained(temporary, safe_serialization=True)
        for file in temporary.rglob("*.safetensors"):
            tensors = {
                name: value.to(DTYPES[dtype]) if value.is_floating_point() else value
                for name, value in load_tensors(file).items()
            }
            save_tensors(file, tensors, {"format": "pt"})
        for file in family.folder.glob("tokenizer*/*"):
            copy_plain(file, temporary / file.parent.name / file.name, family.folder)
        _keep_estimator(family.folder, temporary)
        _forget_origin(temporary)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if verify == "off":
        return unchecked(Folder.name, path, sum(1 for part in family.parts.values() for _ in part.parameters()))
    count, check = _compare(family, path, DTYPES[dtype], verify)
    error, readers = (0.0, ["diffusers"]) if check.passed else (float("inf"), [])
    return Exported(Folder.name, path, size, count, error, readers, [check])


def _keep_estimator(base: Path, folder: Path) -> None:
    """Copies the model that makes depth maps, which a depth base includes and this program does not load."""
    index, listed = read_config(folder, "model_index.json"), read_config(base, "model_index.json")
    names = [name for name in ("depth_estimator", "feature_extractor") if "depth_estimator" in index]
    there = [name for name in names if (base / name).is_dir() and name in listed]
    for name in there:
        for file in sorted(file for file in (base / name).rglob("*") if file.is_file()):
            copy_plain(file, folder / file.relative_to(base), base)
    write_json(folder / "model_index.json", index | {name: listed[name] for name in there})


def _forget_origin(folder: Path) -> None:
    """Removes the local path that diffusers writes into each config: the folder may be shared."""
    for file in folder.rglob("*.json"):
        values = read_json(file, dict)
        if values.pop("_name_or_path", None) is not None:
            write_json(file, values)


def _compare(family: Family, path: Path, dtype: torch.dtype, verify: Verify) -> tuple[int, Check]:
    """Compares the folder's tokenizer files, and every weight with the trained one rounded to the stored dtype. One
    part at a time is in memory, loaded like any base's or (`deltas`) read from its files."""
    again = unloaded(family_of(path), path, dtype) if verify == "full" else None
    count = 0
    for part in family.parts:
        fault = _other_weights(family, again, path, part, dtype)
        if fault:
            return count, Check("weights", False, fault)
        count += sum(1 for _ in family.parts[part].parameters())
    for file in family.folder.glob("tokenizer*/*"):
        if file.read_bytes() != (path / file.parent.name / file.name).read_bytes():
            return count, Check("file", False, f"{file.parent.name}/{file.name} differs from the base's")
    return count, Check("weights", True, f"{count} weights re-loaded, bit for bit in the stored precision", 0.0)


def _other_weights(family: Family, again: Family | None, path: Path, part: str, dtype: torch.dtype) -> str:
    """What is wrong with one part of the folder; "" if nothing."""
    wanted = {strip_text_model(name): value for name, value in family.parts[part].named_parameters()}
    with loaded_part(again, part) if again else nullcontext() as module:
        held = module.named_parameters() if module is not None else _stored(path, family, part).items()
        found = {strip_text_model(name): value for name, value in held}
        if wanted.keys() != found.keys():
            return f"{part} has other weights, such as {sorted(wanted.keys() ^ found.keys())[0]}"
        for name, value in wanted.items():
            fault = unlike(value, found[name], dtype)
            if fault:
                return f"{part}.{name} {fault}"
    return ""


def unlike(trained: Tensor, stored: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with a stored weight, which should be the trained one rounded to `dtype`; "" if nothing."""
    wanted = trained.detach().to(dtype).cpu()
    if not torch.equal(wanted, stored.to(dtype)):
        return "differs from the trained weight"
    if not bool(wanted.isfinite().all()):
        name = next(name for name, own in DTYPES.items() if own == dtype)
        return f"has values that {name} can't hold: export with export.dtype=fp32, if they are numbers at all"
    return ""


def _stored(path: Path, family: Family, part: str) -> dict[str, Tensor]:
    """One part's weights from its files, without buffers (SD3's position embeddings), which are never trained."""
    buffers = {strip_text_model(name) for name, _ in family.parts[part].named_buffers()}
    files = sorted((path / family.sources[part].folder).glob("*.safetensors"))
    held = {strip_text_model(name): value for file in files for name, value in load_tensors(file).items()}
    return {name: value for name, value in held.items() if name not in buffers}
