"""kohya's keys: the one LoRA format that every UI reads for SD1, SD2 and SDXL.

Per module `<prefix>_<path with _>`: `.lora_down.weight` [r, in], `.lora_up.weight` [out, r] and a 0-D `.alpha`.
SD1 and SD2 take `lora_te_`, SDXL `lora_te1_` and `lora_te2_` (InvokeAI silently loses others). One alpha in the whole
file: diffusers' reader ignores a per-module one on attention projections.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from finetune.errors import BadInput
from finetune.export.base import Adapter, Export
from finetune.families import REGISTRY, module_paths
from finetune.families.layout import add_text_model
from finetune.files import save_tensors

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


class Kohya(Export):
    name = "kohya"
    read_by = ("ComfyUI", "Forge", "A1111", "InvokeAI", "sdnext", "diffusers")

    def path(self, folder: Path, name: str) -> Path:
        return folder / f"{name}.safetensors"

    def write(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        known = key_table(adapter.family, adapter.base_folder)
        tensors, rank = {}, adapter.rank
        for part, module, a, b in adapter.modules():
            key = key_of(adapter.family, part, module)
            assert key in known, f"{key} is no module of {adapter.family}"
            tensors[key + DOWN] = a.to(dtype)
            tensors[key + UP] = (b * (len(a) / rank)).to(dtype)  # one alpha for all: the readers divide by each rank
            tensors[key + ALPHA] = torch.tensor(float(adapter.alpha))
        save_tensors(path, tensors, metadata)

    def read(self, path: Path, family: str, base_folder: Path) -> Adapter:
        tensors = load_file(path)
        known = key_table(family, base_folder)
        names = {key.rsplit(".lora_", 1)[0].removesuffix(ALPHA) for key in tensors}
        strangers = sorted(names - known.keys())
        if strangers:
            raise BadInput(f"{path} has {len(strangers)} modules that {family} has not, such as {strangers[0]!r}")
        layers: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        modules = {name: _three(path, tensors, name) for name in sorted(names)}
        scales = {alpha / len(a) for a, _, alpha in modules.values()}
        scale = scales.pop() if len(scales) == 1 else 1.0
        for name, (a, b, alpha) in modules.items():
            part, module = known[name]
            layers.setdefault(part, {})[module] = (a.float(), b.float() * (alpha / len(a) / scale))
        return Adapter(family, base_folder, layers, scale)


def key_of(family: str, part: str, module: str) -> str:
    path = add_text_model(module) if part.startswith("text_encoder") else module
    return f"{REGISTRY[family].export_prefix[part]}_{path.replace('.', '_')}"


def key_table(family: str, base_folder: Path) -> dict[str, tuple[str, str]]:
    """Every name that a file of this base may hold -> (part, module path), from the base's real architecture."""
    paths = module_paths(base_folder)
    return {
        key_of(family, part, module): (part, module)
        for part, modules in paths.items()
        if part in REGISTRY[family].export_prefix
        for module in modules
    }


def keys_of(path: Path) -> list[str]:
    """A safetensors file's keys, without its tensors; empty for anything else."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return []
    try:
        with safe_open(path, "pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is no whole safetensors file ({error}): export it again") from error


def _three(path: Path, tensors: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    missing = [ending for ending in (DOWN, UP, ALPHA) if name + ending not in tensors]
    if missing:
        raise BadInput(f"{path}: {name} has no {missing[0].lstrip('.')}: a reader would take a wrong scale or skip it")
    return tensors[name + DOWN], tensors[name + UP], float(tensors[name + ALPHA])
