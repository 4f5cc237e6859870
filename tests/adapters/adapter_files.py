"""Small LoRA files of true sizes, made from a published configuration, for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.adapters.bases import PUBLISHED
from finetune.export.lora.diffusers import prefixes
from finetune.export.lora.kohya import key_table
from finetune.families.naming.clip import add_text_model
from finetune.families.registry import family_of, weight_shapes

Tensors = dict[str, Tensor]
WORDS = (
    "to_q",
    "to_k",
    "to_out_0",
    "conv1",
    "self_attn_q_proj",
    "attn_qkv",
    "attn2_qkv",
    "attn_proj",
    "linear1",
    "_mlp_fc1",
)


def pair(shape: torch.Size, rank: int, made: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B of a module, random."""
    down = torch.randn(rank, *shape[1:], generator=made) * 0.02
    return down, torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=made) * 0.02


def kohya_file(folder: Path, every: int = 1, alpha: float = 2.0, rank: int = 2) -> Tensors:
    """kohya's tensors for the base in `folder`: each `every`-th of the modules that trainers usually adapt."""
    made, weights = torch.Generator().manual_seed(0), weight_shapes(folder)
    names = {name: place for name, place in sorted(key_table(folder).items()) if name.endswith(WORDS)}
    tensors: Tensors = {}
    for name in list(names)[::every]:
        place = names[name]
        shape = weights[place.part][place.modules[0]]
        down, up = pair(torch.Size([sum(place.rows), *shape[1:]]), rank, made)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def diffusers_file(folder: Path, every: int = 1, rank: int = 2) -> Tensors:
    """The same for diffusers' keys."""
    made, names = torch.Generator().manual_seed(0), prefixes(family_of(folder).name)
    tensors: Tensors = {}
    for part, modules in weight_shapes(folder).items():
        for module in [path for path in sorted(modules) if path.replace(".", "_").endswith(WORDS)][::every]:
            path = add_text_model(module) if part != "denoiser" else module
            down, up = pair(modules[module], rank, made)
            tensors[f"{names[part]}.{path}.lora_A.weight"], tensors[f"{names[part]}.{path}.lora_B.weight"] = down, up
    return tensors


def published(name: str) -> Path:
    return PUBLISHED / name


def saved(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def scales_header(prefix: str, rank: int, alpha: float) -> dict[str, str]:
    """The header in which diffusers keeps peft.LoraConfig."""
    config = {"r": rank, "lora_alpha": alpha, "target_modules": ["to_q"]}
    return {"lora_adapter_metadata": json.dumps({f"{prefix}.{key}": value for key, value in config.items()})}


Spoil = Callable[[Tensors], object]
