"""kohya's keys: the one LoRA format that every UI reads for SD1, SD2 and SDXL.

Per matrix `<prefix>_<path with _>`: `.lora_down.weight` [r, in], `.lora_up.weight` [out, r] and a 0-D `.alpha`.
The prefixes are `lora_te_` for SD1 and SD2, and `lora_te1_` and `lora_te2_` for SDXL (InvokeAI silently skips others).
The whole file has one alpha, because diffusers' reader ignores a module's own alpha on attention projections.

For SD3 and Flux the format joins q, k and v into one matrix: the down matrices are stacked, and the up matrices are
placed on a diagonal. A joined matrix has a higher rank; its up matrix carries the difference, so that alpha stays one.
Zeros fill its rank up to a doubling of the lowest rank: the difference is then a power of two, exact in fp16.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.core.errors import BadInput
from finetune.core.files import save_tensors
from finetune.export.base import Adapter, AdapterExport, pad_rank
from finetune.export.metadata import with_numbers
from finetune.families.naming.clip import add_text_model
from finetune.families.registry import FAMILIES, denoiser_config, family_of, weight_shapes

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
Pair = tuple[Tensor, Tensor]
ATTENTION = re.compile(r".*\.self_attn\.(q|k|v|out)_proj")
NEEDS_OUT_PROJ = (
    "it takes a text encoder's attention from kohya's keys only if an out_proj is among them: use the diffusers format"
)


@dataclass(frozen=True)
class Place:
    """The modules that one name in a file stands for: they are joined by rows; `rows` is the number of each."""

    part: str
    modules: tuple[str, ...]
    rows: tuple[int, ...]


class Kohya(AdapterExport):
    name = "kohya"
    recognised = True
    read_by = ("ComfyUI", "Forge", "A1111", "InvokeAI", "sdnext", "diffusers")

    def path(self, folder: Path, name: str, family: str) -> Path:
        main = FAMILIES[family].naming.ui_format == self.name
        return folder / (f"{name}.safetensors" if main else f"{name}-kohya.safetensors")

    def readers(self, adapter: Adapter) -> tuple[str, ...]:
        found = FAMILIES[adapter.family].naming.known_readers.of(_form(adapter))
        return tuple(name for name in found if name != "diffusers") if lacks_out_proj(adapter) else found

    def limits(self, adapter: Adapter) -> list[str]:
        found = FAMILIES[adapter.family].naming.known_readers.limits(_form(adapter))
        return [*found, f"diffusers: refused or partly, {NEEDS_OUT_PROJ}"] if lacks_out_proj(adapter) else found

    def write(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        known = key_table(adapter.base_folder)
        written = [(part, module) for part, module, _, _ in adapter.modules()]
        nameless = set(written) - {(place.part, module) for place in known.values() for module in place.modules}
        if nameless:
            raise BadInput(
                f"kohya's format has no name for {len(nameless)} modules of this adapter, such as "
                f"{' '.join(sorted(nameless)[0])}: use --to diffusers"
            )
        joined = {}
        for key, place in known.items():
            pairs = [adapter.layers.get(place.part, {}).get(module) for module in place.modules]
            if any(pair is not None for pair in pairs):
                joined[key] = join(pairs, place.rows)
        ranks = [len(a) for a, _ in joined.values()]
        own = max(ranks)
        if FAMILIES[adapter.family].naming.joined:
            own = min(ranks)
            joined = {key: pad_rank(a, b, _doubled(own, len(a))) for key, (a, b) in joined.items()}
        alpha = torch.tensor(float(adapter.scale * own))
        tensors = {}
        for key, (a, b) in joined.items():
            tensors[key + DOWN] = a.to(dtype).contiguous()
            tensors[key + UP] = (b * (len(a) / own)).to(dtype)  # the readers divide alpha by each rank
            tensors[key + ALPHA] = alpha.clone()
        largest = max(len(a) for a, _ in joined.values())
        save_tensors(path, tensors, with_numbers(metadata, tensors, largest, float(alpha)))

    def read(self, path: Path, family: str, base_folder: Path) -> Adapter:
        tensors = load_file(path)
        known = key_table(base_folder)
        names = {key.rsplit(".lora_", 1)[0].removesuffix(ALPHA) for key in tensors}
        unknown_keys = sorted(names - known.keys())
        if unknown_keys:
            raise BadInput(
                f"{path} has {len(unknown_keys)} modules that {family} does not have, such as {unknown_keys[0]!r}: "
                "give an adapter for this base"
            )
        layers: dict[str, dict[str, Pair]] = {}
        modules = {name: _three(path, tensors, name) for name in sorted(names)}
        scales = {alpha / len(a) for a, _, alpha in modules.values()}
        scale = scales.pop() if len(scales) == 1 else 1.0
        for name, (a, b, alpha) in modules.items():
            place = known[name]
            for module, pair in split(a.float(), b.float() * (alpha / len(a) / scale), place).items():
                layers.setdefault(place.part, {})[module] = pair
        return Adapter(family, base_folder, layers, scale)


def lacks_out_proj(adapter: Adapter) -> bool:
    """Whether a text encoder has attention modules but no out_proj: by that alone diffusers (0.42,
    `convert_state_dict_to_diffusers`) knows the keys that it makes of kohya's."""
    held = [
        {match[1] for module in modules if (match := ATTENTION.fullmatch(module))}
        for part, modules in adapter.layers.items()
        if part.startswith("text_encoder")
    ]
    return any(matrices and "out" not in matrices for matrices in held)


def _form(adapter: Adapter) -> str:
    return "kohya" if adapter.layers.keys() == {"denoiser"} else "kohya_with_texts"


def _doubled(rank: int, least: int) -> int:
    """`rank`, doubled until it is at least `least`."""
    while rank < least:
        rank *= 2
    return rank


def join(pairs: list[Pair | None], rows: tuple[int, ...]) -> Pair:
    """Joins modules that share one matrix in the file into one (A, B): A is stacked and B is block-diagonal. A module
    without an adapter gets rows of zeros."""
    if len(pairs) == 1:
        assert pairs[0] is not None
        return pairs[0]
    held = [pair for pair in pairs if pair is not None]
    a = torch.cat([pair[0] for pair in held])
    b = held[0][1].new_zeros(sum(rows), len(a))
    top = left = 0
    for pair, height in zip(pairs, rows, strict=True):
        if pair is not None:
            b[top : top + height, left : left + len(pair[0])] = pair[1]
            left += len(pair[0])
        top += height
    return a, b


def split(a: Tensor, b: Tensor, place: Place) -> dict[str, Pair]:
    """The inverse of `join`, for joined matrices of any trainer: each module gets its rows of B without the columns
    that are zero there. A module with only zero rows counts as absent, unless there are columns that no other uses."""
    if len(place.modules) == 1:
        return {place.modules[0]: (a, b)}
    parts = dict(zip(place.modules, b.split(list(place.rows)), strict=True))
    used = {module: rows.flatten(1).any(0) for module, rows in parts.items()}
    filled = a.flatten(1).any(1)  # other ranks are padding
    left = (torch.stack(list(used.values())).logical_not().all(0) & filled).nonzero().flatten()
    silent = [module for module, columns in used.items() if not bool(columns.any())]
    for module, columns in zip(silent, left.chunk(len(silent)) if len(left) and silent else [], strict=False):
        used[module] = torch.zeros(len(a), dtype=torch.bool).index_fill(0, columns, True)
    return {
        module: (a[used[module]], rows[:, used[module]]) for module, rows in parts.items() if bool(used[module].any())
    }


def key_of(family: str, part: str, module: str) -> str:
    path = add_text_model(module) if part.startswith("text_encoder") else module
    return f"{FAMILIES[family].naming.prefixes[part]}_{path.replace('.', '_')}"


def key_table(base_folder: Path) -> dict[str, Place]:
    """Every name that a file for this base may hold, derived from the base's configs."""
    family = family_of(base_folder).name
    return {key_of(family, part, name): place for (part, name), place in places(base_folder).items()}


def places(base_folder: Path) -> dict[tuple[str, str], Place]:
    """(part, name in the file's format, with dots) -> the modules that it stands for."""
    family, shapes = family_of(base_folder), weight_shapes(base_folder)
    table = {}
    for part, modules in shapes.items():
        names = {module: [module] for module in modules}
        if part == "denoiser":
            names = family.naming.original_names(list(modules), denoiser_config(base_folder))
        for name, held in names.items():
            table[(part, name)] = Place(part, tuple(held), tuple(modules[module][0] for module in held))
    return table


def keys_of(path: Path) -> list[str]:
    """The keys of a safetensors file, without reading its tensors; empty for other kinds of files."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return []
    try:
        with safe_open(path, "pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a complete safetensors file ({error}): export it again") from error


def _three(path: Path, tensors: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor, float]:
    missing = [ending for ending in (DOWN, UP, ALPHA) if name + ending not in tensors]
    if missing:
        raise BadInput(
            f"{path}: {name} has no {missing[0].lstrip('.')}, so readers would skip it or use a wrong scale: export "
            "it "
            "again"
        )
    return tensors[name + DOWN], tensors[name + UP], float(tensors[name + ALPHA])
