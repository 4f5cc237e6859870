"""PEFT's own folder, one for each part: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetune.core.errors import BadInput
from finetune.core.files import save_tensors, write_json
from finetune.core.reading import read_json
from finetune.export.base import Adapter, AdapterExport
from finetune.families.naming.clip import strip_text_model
from finetune.families.registry import own_paths

PREFIX = "base_model.model."
# ways to begin A and B that leave the base as it is; PiSSA, OLoRA and CorDA take a part of it out
BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")


def kind_of(config: dict[str, Any]) -> str:
    """The kind of adapter in an adapter_config.json: "LORA", "DORA", "LOHA", ..."""
    return "DORA" if config.get("use_dora") else str(config.get("peft_type", "LORA"))


class Peft(AdapterExport):
    name = "peft"
    recognised = True
    read_by = ("peft",)

    def path(self, folder: Path, name: str, family: str) -> Path:
        return folder / f"{name}-peft"

    def write(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        adapter, own = adapter.padded(), own_paths(adapter.base_folder)
        for part, layers in adapter.layers.items():
            tensors = {}
            for module, (a, b) in layers.items():
                tensors[f"{PREFIX}{own[part][module]}.lora_A.weight"] = a.to(dtype)
                tensors[f"{PREFIX}{own[part][module]}.lora_B.weight"] = b.to(dtype)
            save_tensors(path / part / "adapter_model.safetensors", tensors, {"format": "pt"})
            config = {
                "peft_type": "LORA",
                "task_type": None,
                "r": adapter.rank,
                "lora_alpha": adapter.alpha,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": sorted(layers),
                "inference_mode": True,
            }
            write_json(path / part / "adapter_config.json", config)

    def read(self, path: Path, family: str, base_folder: Path) -> Adapter:
        layers: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        rules = set()
        for config_file in sorted(path.glob("*/adapter_config.json")):
            config = read_json(config_file, dict)
            if kind_of(config) != "LORA" or config.get("rank_pattern") or config.get("alpha_pattern"):
                raise BadInput(
                    f"{path} holds a {kind_of(config)} adapter of PEFT, not a plain LoRA with one rank and alpha: use "
                    "the kohya or diffusers file, or load it with PEFT"
                )
            begun = config.get("init_lora_weights")
            if isinstance(begun, str) and begun.lower() not in BEGINNINGS:
                raise BadInput(
                    f"{config_file.parent} was begun with init_lora_weights {begun[:40]!r}, which changes the base "
                    "itself, so that its matrices are no change of the base: save it with PEFT's "
                    "path_initial_model_for_weight_conversion, and give that"
                )
            try:
                rank, alpha = int(config["r"]), float(config["lora_alpha"])
                layers[config_file.parent.name] = _pairs(config_file.with_name("adapter_model.safetensors"), rank)
            except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
                raise BadInput(
                    f"{config_file.parent} is not a complete PEFT LoRA ({type(error).__name__}: {error}): give another"
                ) from error
            rules.add((rank, alpha * rank**0.5 if config.get("use_rslora") else alpha))
        if len(rules) != 1:
            raise BadInput(
                f"{path} has parts with different ranks or alphas ({sorted(rules)}): use the kohya or diffusers file"
            )
        rank, alpha = rules.pop()
        return Adapter(family, base_folder, layers, alpha / rank)


def _pairs(file: Path, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> (A, B), fp32. Raises ValueError or KeyError if a matrix is missing or has another rank, or if there
    are other tensors: trained biases, or whole modules (`modules_to_save`)."""
    tensors, pairs = load_file(file), {}
    other = next((key for key in sorted(tensors) if not key.endswith((".lora_A.weight", ".lora_B.weight"))), None)
    if other is not None:
        raise ValueError(f"{other[:100]!r} is no matrix of a LoRA, and would be lost")
    for key in sorted(key for key in tensors if key.endswith(".lora_A.weight")):
        a, b = tensors[key].float(), tensors[key.replace(".lora_A.", ".lora_B.")].float()
        if not key.isprintable() or a.ndim < 2 or b.ndim < 2 or not rank == len(a) == b.shape[1] >= 1:
            raise ValueError(f"{key[:100]!r} is not a matrix of rank {rank}")
        pairs[strip_text_model(key.removeprefix(PREFIX).removesuffix(".lora_A.weight"))] = (a, b)
    if not pairs:
        raise ValueError("it has no matrices")
    return pairs
