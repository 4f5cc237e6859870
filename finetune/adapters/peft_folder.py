"""Checks a PEFT folder, as PEFT itself writes it, against a base."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from finetune.adapters.bases import chosen_base
from finetune.adapters.checks import another_base
from finetune.adapters.pairs import Faulty, pair_of
from finetune.adapters.result import Inspection, dtype_name
from finetune.core.errors import BadInput
from finetune.export.lora.kohya import places
from finetune.export.lora.peft import Peft
from finetune.families.registry import weight_shapes

BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")  # of a UNet


def inspect_folder(path: Path, base: str | None) -> Inspection:
    """Like `inspect_adapter`, for a PEFT folder."""
    if not any(path.glob("*/adapter_config.json")):
        if (path / "recipe.yaml").is_file():
            raise BadInput(f"{path} is a run folder, not an adapter: give one of the files in {path / 'exports'}")
        raise BadInput(f"{path} is not a PEFT folder (it has no PART/adapter_config.json): give a LoRA file")
    adapter = Peft().read(path, "", Path())
    unet = any(module.startswith(BLOCKS) for module in adapter.layers.get("denoiser", {}))
    names = {"denoiser": "unet" if unet else "transformer"}  # as diffusers' files call it
    shapes = {
        f"{names.get(part, part)}.{module}": {"a": a.shape, "b": b.shape} for part, module, a, b in adapter.modules()
    }
    compared = chosen_base(path, shapes, {}, base)
    files = sorted(path.glob("*/adapter_model.safetensors"))
    with safe_open(files[0], "pt") as opened:
        dtype = dtype_name(opened.get_tensor(next(iter(opened.keys()))))
    found = Inspection(
        path=path,
        kind="peft",
        compared=compared,
        family=compared.family,
        dtypes=(dtype,),
        size=sum(file.stat().st_size for file in files),
        metadata={},
        adapter=replace(adapter, family=compared.family, base_folder=compared.folder, alike=compared.alike),
        ranks=Counter(len(a) for _, _, a, _ in adapter.modules()),
        scales=Counter({round(adapter.scale, 6): adapter.count}),
    )
    sizes = _check_modules(found)
    readable = len(shapes) - len(found.unknown_keys) - sum(len(one.modules) for one in found.faults.values())
    another_base(found, shapes, sizes, readable)
    found.judge(list(shapes))
    return found


def _check_modules(found: Inspection) -> dict[str, tuple[str, str]]:
    """Records the faults of the folder's modules; returns those of other sizes than in the base."""
    assert found.adapter is not None
    folder = found.compared.folder
    table = {(place.part, module) for place in places(folder).values() for module in place.modules}
    weights = weight_shapes(folder)
    sizes: dict[str, tuple[str, str]] = {}
    for part, module, a, b in found.adapter.modules():
        name = f"{part}.{module}"
        if (part, module) not in table:
            found.unknown_keys.append(name)
            continue
        held: dict[str, Tensor] = {"a": a, "b": b}
        try:
            pair_of(held, weights[part][module])
        except Faulty as error:
            found.fault(error.fault, name, of=error.of)
            sizes |= {name: error.sizes} if error.sizes else {}
            continue
        if not bool(a.any()) or not bool(b.any()):
            found.zero.append(name)
    return sizes
