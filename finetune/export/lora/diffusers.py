"""diffusers' own LoRA file: PEFT keys per part, and the alpha as JSON in the header.

Without that header diffusers assumes alpha = rank, which changes the adapter's strength. Some UIs read this
format for SD3 and Flux too, but not its header: there, the scale is multiplied into the matrices.
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
from finetune.export.metadata import with_numbers
from finetune.families.naming.clip import add_text_model, strip_text_model
from finetune.families.registry import FAMILIES

NAMES, PATTERNS = ("target_modules", "exclude_modules", "modules_to_save"), ("rank_pattern", "alpha_pattern")
# settings without an effect on the result, or only with others that are refused (megatron_config)
WORDS = ("bias", "peft_type", "task_type", "peft_version", "revision", "base_model_name_or_path", "megatron_core")
PLAIN = re.compile(r"\^?[\w.]+")  # a plain module name, where PEFT would also accept a pattern
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
        return FAMILIES[adapter.family].naming.known_readers.of(_form(adapter))

    def limits(self, adapter: Adapter) -> list[str]:
        return FAMILIES[adapter.family].naming.known_readers.limits(_form(adapter))

    def write(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        adapter, names = adapter.padded(), prefixes(adapter.family)
        if FAMILIES[adapter.family].naming.scale_in_matrices:
            adapter = adapter.folded()  # UIs assume alpha = rank
        tensors = {}
        for part, module, a, b in adapter.modules():
            key = f"{names[part]}.{add_text_model(module) if part.startswith('text_encoder') else module}"
            tensors[f"{key}.lora_A.weight"] = a.to(dtype)
            tensors[f"{key}.lora_B.weight"] = b.to(dtype)
        header = json.dumps(_header(adapter), indent=2, sort_keys=True)
        told = with_numbers(metadata, tensors, adapter.rank, adapter.alpha)
        save_tensors(path, tensors, told | {HEADER: header, "format": "pt"})

    def read(self, path: Path, family: str, base_folder: Path) -> Adapter:
        with safe_open(path, "pt") as opened:
            about = read_header(path, opened.metadata() or {})
        if not about:
            raise BadInput(
                f"{path} has no alpha ({HEADER} is missing in its header), and diffusers would use the rank instead: "
                "export it again"
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


def _form(adapter: Adapter) -> str:
    return "diffusers_format" if adapter.layers.keys() == {"denoiser"} else "with_texts"


def read_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of peft.LoraConfig in a file's header, by "PART.NAME"; empty without such a header.

    diffusers passes them to PEFT unchanged, so a header could do harm: PEFT matches patterns against every module,
    which can take forever, and some kinds of initialisation change the base.

    Raises:
        BadInput: the header is not JSON, or holds anything but ranks, alphas, names and switches.
    """
    held = parse_json(metadata.get(HEADER, "{}"), f"{HEADER} in the header of {path}", dict, "export it again")
    for key, value in held.items():
        if not _is_plain(key.rpartition(".")[2], value):
            raise BadInput(
                f"{path}: the value of {key[:80]!r} in its header ({HEADER}) is not one that diffusers writes: export "
                "it again"
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
    """part -> its name in diffusers: "unet" or "transformer", "text_encoder", "text_encoder_2"."""
    return {part: FAMILIES[family].sources[part].folder for part in FAMILIES[family].trainable_parts()}


def _header(adapter: Adapter) -> dict[str, Any]:
    """peft.LoraConfig's arguments per part; paths without the wrapper match both layouts of CLIP."""
    header: dict[str, Any] = {}
    names = prefixes(adapter.family)
    for part, layers in adapter.layers.items():
        config = {"r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": sorted(layers)}
        header |= {f"{names[part]}.{key}": value for key, value in config.items()}
    return header
