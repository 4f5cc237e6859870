"""diffusers' own LoRA file: PEFT keys per part, and the alpha as JSON in the header.

Without that header diffusers takes alpha = rank, and the reloaded adapter is another one. For SD3 and Flux this is
also the form that the UIs read; none of them reads the header, so the scale is in the matrices there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from finetune.core.errors import BadInput
from finetune.core.files import save_tensors
from finetune.core.reading import parse_json
from finetune.export.base import Adapter, AdapterExport
from finetune.families.naming.clip import add_text_model, strip_text_model
from finetune.families.registry import FAMILIES

NAMES, PATTERNS = ("target_modules", "exclude_modules", "modules_to_save"), ("rank_pattern", "alpha_pattern")
# of no effect on what is computed, or not without others that are refused (megatron_config)
WORDS = ("bias", "peft_type", "task_type", "peft_version", "revision", "base_model_name_or_path", "megatron_core")
PLAIN = re.compile(r"\^?[\w.]+")  # a module's name, also where PEFT would take a pattern
HEADER = "lora_adapter_metadata"
FILE = "pytorch_lora_weights.safetensors"


class Diffusers(AdapterExport):
    name = "diffusers"
    recognised = True
    read_by = ("diffusers",)

    def path(self, folder: Path, name: str, family: str) -> Path:
        main = FAMILIES[family].naming.ui_format == self.name
        return folder / (f"{name}.safetensors" if main else f"{name}-diffusers/{FILE}")

    def readers(self, adapter: Adapter) -> tuple[str, ...]:
        readers = FAMILIES[adapter.family].naming.known_readers
        return readers.diffusers_format if adapter.layers.keys() == {"denoiser"} else readers.with_texts

    def write(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        adapter, names = adapter.padded(), prefixes(adapter.family)
        if FAMILIES[adapter.family].naming.scale_in_matrices:
            adapter = adapter.folded()  # UIs take alpha = rank
        tensors = {}
        for part, module, a, b in adapter.modules():
            key = f"{names[part]}.{add_text_model(module) if part.startswith('text_encoder') else module}"
            tensors[f"{key}.lora_A.weight"] = a.to(dtype)
            tensors[f"{key}.lora_B.weight"] = b.to(dtype)
        header = json.dumps(_header(adapter), indent=2, sort_keys=True)
        save_tensors(path, tensors, metadata | {HEADER: header, "format": "pt"})

    def read(self, path: Path, family: str, base_folder: Path) -> Adapter:
        with safe_open(path, "pt") as opened:
            about = read_header(path, opened.metadata() or {})
        if not about:
            raise BadInput(
                f"{path} does not say its alpha ({HEADER} is not in its header): diffusers would take the rank"
            )
        layers: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        tensors, names = load_file(path), prefixes(family)
        for key in tensors:
            if not key.endswith(".lora_A.weight"):
                continue
            module = key.removesuffix(".lora_A.weight")
            prefix, inside = module.split(".", 1)
            part = next(name for name, value in names.items() if value == prefix)
            pair = (tensors[key].float(), tensors[f"{module}.lora_B.weight"].float())
            layers.setdefault(part, {})[strip_text_model(inside)] = pair
        prefix = names[next(iter(layers))]
        rank, alpha = int(about[f"{prefix}.r"]), float(about[f"{prefix}.lora_alpha"])
        return Adapter(family, base_folder, layers, alpha / rank)


def read_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of peft.LoraConfig that a file's header holds, by "PART.NAME"; none where it has no such header.

    diffusers hands them to PEFT as they are. There a pattern is tried against every module, which can take for ever,
    and a start other than LoRA's own changes the base.

    Raises:
        BadInput: it is no JSON, or holds anything but ranks, alphas, names and switches.
    """
    held = parse_json(metadata.get(HEADER, "{}"), f"{HEADER} in the header of {path}", dict, "export it again")
    for key, value in held.items():
        if not _is_plain(key.rpartition(".")[2], value):
            raise BadInput(
                f"{path}: {key[:80]!r} in its header ({HEADER}) is not what diffusers writes there: export it again"
            )
    return held


def _is_plain(name: str, value: Any) -> bool:
    if value is None or value in ([], {}, "") or isinstance(value, bool | int | float):
        return True
    if name in NAMES:
        return isinstance(value, list) and all(isinstance(item, str) and PLAIN.fullmatch(item) for item in value)
    if name in PATTERNS:
        return isinstance(value, dict) and all(
            PLAIN.fullmatch(key) and isinstance(number, int | float) for key, number in value.items()
        )
    if name == "runtime_config":
        return isinstance(value, dict) and all(isinstance(item, bool) for item in value.values())
    return isinstance(value, str) and (name in WORDS or (name, value) == ("init_lora_weights", "gaussian"))


def prefixes(family: str) -> dict[str, str]:
    """part -> what diffusers calls it: "unet" or "transformer", "text_encoder", "text_encoder_2"."""
    return {part: FAMILIES[family].sources[part].folder for part in FAMILIES[family].trainable_parts()}


def _header(adapter: Adapter) -> dict[str, Any]:
    """peft.LoraConfig's arguments per part; paths without the wrapper match both layouts of CLIP."""
    header: dict[str, Any] = {}
    names = prefixes(adapter.family)
    for part, layers in adapter.layers.items():
        config = {"r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": sorted(layers)}
        header |= {f"{names[part]}.{key}": value for key, value in config.items()}
    return header
