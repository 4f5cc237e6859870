"""A fully fine-tuned model as a complete diffusers folder, checked by loading it again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from finetune.core.devices import DTYPES
from finetune.core.files import copy_plain, load_tensors, replacing_folder, save_tensors, write_json
from finetune.core.reading import read_json
from finetune.core.records import Check
from finetune.export.base import Exported, unchecked
from finetune.export.settings import Verify
from finetune.families.base import Family
from finetune.families.configs import read_config
from finetune.families.naming.clip import strip_text_model
from finetune.families.source import load_family


def export_folder(family: Family, path: Path, dtype: str, verify: Verify = "full") -> Exported:
    """Writes `path` (replacing an older export), in `dtype`, and compares every weight of the re-loaded folder."""
    with replacing_folder(path) as temporary:
        family.pipeline().save_pretrained(temporary, safe_serialization=True)
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
        return unchecked("folder", path, sum(1 for part in family.parts.values() for _ in part.parameters()))
    count, check = _compare(family, path, DTYPES[dtype], verify)
    error, readers = (0.0, ["diffusers"]) if check.passed else (float("inf"), [])
    return Exported("folder", path, size, count, error, readers, [check])


def _keep_estimator(base: Path, folder: Path) -> None:
    """A depth base comes with a model that makes depth maps, which is not ours to load."""
    index, listed = read_config(folder, "model_index.json"), read_config(base, "model_index.json")
    names = [name for name in ("depth_estimator", "feature_extractor") if "depth_estimator" in index]
    there = [name for name in names if (base / name).is_dir() and name in listed]
    for name in there:
        for file in sorted(file for file in (base / name).rglob("*") if file.is_file()):
            copy_plain(file, folder / file.relative_to(base), base)
    write_json(folder / "model_index.json", index | {name: listed[name] for name in there})


def _forget_origin(folder: Path) -> None:
    """diffusers notes in each config where a part came from: a path of this machine, in a folder to be shared."""
    for file in folder.rglob("*.json"):
        values = read_json(file, dict)
        if values.pop("_name_or_path", None) is not None:
            write_json(file, values)


def _compare(family: Family, path: Path, dtype: torch.dtype, verify: Verify) -> tuple[int, Check]:
    """Every weight of the folder, loaded as any base is or (`deltas`) read from its files, against the trained one
    rounded to the stored dtype."""
    again = load_family(str(path), dtype=dtype) if verify == "full" else None
    count = 0
    for part, module in family.parts.items():
        wanted = {strip_text_model(name): value.to(dtype).cpu() for name, value in module.named_parameters()}
        held = again.parts[part].named_parameters() if again else _stored(path, family, part).items()
        found = {strip_text_model(name): value for name, value in held}
        if wanted.keys() != found.keys():
            odd = sorted(wanted.keys() ^ found.keys())
            return count, Check("weights", False, f"{part} has other weights, such as {odd[0]}")
        for name, value in wanted.items():
            if not torch.equal(value, found[name].to(dtype)):
                return count, Check("weights", False, f"{part}.{name} is not what was trained")
        count += len(wanted)
    return count, Check("weights", True, f"{count} weights re-loaded, bit for bit in the stored precision", 0.0)


def _stored(path: Path, family: Family, part: str) -> dict[str, Tensor]:
    """One part's weights, from its files alone; without buffers (SD3's positions), which nothing trains."""
    buffers = {strip_text_model(name) for name, _ in family.parts[part].named_buffers()}
    files = sorted((path / family.sources[part][0]).glob("*.safetensors"))
    held = {strip_text_model(name): value for file in files for name, value in load_tensors(file).items()}
    return {name: value for name, value in held.items() if name not in buffers}
