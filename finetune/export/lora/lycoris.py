"""LyCORIS' own format (arXiv:2309.14859): LoHa, LoKr and DoRA as they were trained, without an approximation.

The names of modules are kohya's. For SD3 and Flux, q, k and v stay apart, since a joined LoKr does not exist: there
the denoiser's modules have diffusers' names after `lycoris_`, as SimpleTuner writes them and ComfyUI reads them.

Readers take a DoRA's `dora_scale` in different ways. ComfyUI and Forge divide it by the norm of each output's base
weights; these files are for them, at strength 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.core.devices import doubled
from finetune.core.errors import BadInput
from finetune.core.files import save_tensors
from finetune.export.base import NativeExport, Request
from finetune.export.lora.kohya import key_table
from finetune.export.metadata import checkpoint_metadata, with_numbers
from finetune.families.base import Family
from finetune.families.registry import FAMILIES
from finetune.methods.peft_adapter import PeftAdapter

ALGORITHMS = {"dora": "lora", "loha": "loha", "lokr": "lokr"}  # LyCORIS' names: DoRA is a setting of its lora
LOHA, DORA = "hada_w1_a", "dora_scale"
DOWNS = (".lora_down.weight", ".hada_w1_b", ".lokr_w2_b")  # matrices with a row for each rank


class Lycoris(NativeExport):
    name = "lycoris"
    holds = "DoRA, LoHa and LoKr"

    def path(self, folder: Path, name: str, family: str) -> Path:
        return folder / f"{name}-lycoris.safetensors"

    def readers(self, method: PeftAdapter, family: str) -> tuple[str, ...]:
        return FAMILIES[family].naming.known_readers.of(method.kind)

    def limits(self, method: PeftAdapter, family: str) -> list[str]:
        return FAMILIES[family].naming.known_readers.limits(method.kind)

    def write(self, method: PeftAdapter, family: Family, path: Path, request: Request) -> None:
        """Always in fp32: in fp16, DoRA's magnitudes would lose what was learned."""
        names, tensors = module_names(family.folder), {}
        for part, module, layer in method.layers(family):
            if (part, module) not in names:
                raise BadInput(f"LyCORIS' format has no name for {part} {module}: use --to peft")
            for name, value in method.native_tensors(layer).items():
                tensors[f"{names[part, module]}.{name}"] = value.float().cpu().contiguous()
        save_tensors(path, tensors, with_numbers(_metadata(method, family, request), tensors, *_numbers(tensors)))

    def read(self, path: Path, family: Family) -> dict[tuple[str, str], dict[str, Tensor]]:
        places = {name: place for place, name in module_names(family.folder).items()}
        found: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in load_file(path).items():
            module, _, name = key.partition(".")
            if module not in places:
                raise BadInput(f"{path} has {module}, which {family.name} does not have: give a file for this base")
            found.setdefault(places[module], {})[name] = value
        return found

    def change(self, tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        held, base = {name: doubled(value) for name, value in tensors.items()}, doubled(weight)
        if DORA in held:
            return (_decomposed(held, base) - base).float()
        product = _hadamard(held) if LOHA in held else _kronecker(held)
        return product.reshape(base.shape).float()


def module_names(base_folder: Path) -> dict[tuple[str, str], str]:
    """(part, module path) -> the module's name in the file."""
    table, names = key_table(base_folder), {}
    for key, place in table.items():
        for module in place.modules:
            names[place.part, module] = key if len(place.modules) == 1 else _own_name(module)
    if any(len(place.modules) > 1 for place in table.values()):
        denoiser = [module for part, module in names if part == "denoiser"]
        names |= {("denoiser", module): _own_name(module) for module in denoiser}  # one style in the whole file
    return names


def _own_name(module: str) -> str:
    return f"lycoris_{module.replace('.', '_')}"


def _hadamard(held: Mapping[str, Tensor]) -> Tensor:
    """(alpha / r) (W1a W1b) * (W2a W2b), * by element (arXiv:2108.06098 proposition 1)."""
    scale = held["alpha"] / len(held["hada_w1_b"])
    return scale * (held[LOHA] @ held["hada_w1_b"]) * (held["hada_w2_a"] @ held["hada_w2_b"])


def _kronecker(held: Mapping[str, Tensor]) -> Tensor:
    """kron(W1, W2) of two whole matrices, or (alpha / r) kron(W1, W2a W2b) (arXiv:2309.14859 section 3.3)."""
    if "lokr_w2" in held:
        small, big = held["lokr_w1"], held["lokr_w2"]
        return torch.kron(small.view(*small.shape, *[1] * (big.ndim - 2)), big)
    scale = held["alpha"] / len(held["lokr_w2_b"])
    return scale * torch.kron(held["lokr_w1"], held["lokr_w2_a"] @ held["lokr_w2_b"])


def _decomposed(held: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """dora_scale / |W| (W + (alpha / r) B A): the weight at strength 1, as ComfyUI and Forge compute it."""
    a, b = held["lora_down.weight"].flatten(1), held["lora_up.weight"].flatten(1)
    moved = base.flatten(1) + held["alpha"] / len(a) * (b @ a)
    norm: Tensor = base.flatten(1).norm(dim=1, keepdim=True)
    return (held[DORA].view(-1, 1) / norm * moved).view_as(base)


def _numbers(tensors: Mapping[str, Tensor]) -> tuple[int | None, float | None]:
    """The largest rank in the file and its module's alpha; None for LoKr of whole matrices alone."""
    found: dict[int, float] = {}
    for key, value in tensors.items():
        if key.endswith(DOWNS):
            alpha = float(tensors[f"{key.partition('.')[0]}.alpha"])
            found[len(value)] = max(alpha, found.get(len(value), alpha))
    return max(found.items()) if found else (None, None)


def _metadata(method: PeftAdapter, family: Family, request: Request) -> dict[str, str]:
    labels = family.naming.labels
    settings = {"algo": ALGORITHMS[method.kind]} | ({"dora_wd": "True"} if method.kind == "dora" else {})
    kohya = {
        "ss_base_model_version": (request.v_prediction and labels.v_kohya) or labels.kohya,
        "ss_v2": str(labels.v2),
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": json.dumps(settings),
        "ss_output_name": request.about["title"],
    }
    return kohya | checkpoint_metadata(family.name, request.about, request.v_prediction, kind="/lora")
