"""An export is done when it has been read back and shown to be the trained adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from finetune import families
from finetune.batch import Geometry
from finetune.draws import generator
from finetune.errors import BadInput
from finetune.export.base import Adapter, Export, Exported, delta
from finetune.families.base import Family
from finetune.families.layout import add_text_model

# the largest relative error of a delta: B and A are each rounded once
BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PREDICTION_BOUND = 1e-4  # two readers of one file, fp32 arithmetic in another order


def verify(adapter: Adapter, export: Export, path: Path, dtype: torch.dtype) -> Exported:
    """Re-opens a written file and compares it: with the trained deltas, and through an independent reader."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    try:
        again = export.read(path, adapter.family, adapter.base_folder)
        error, checks = compare(adapter, again, BOUNDS[dtype])
        if BOUNDS[dtype] < error and dtype == torch.float16 and _faint(adapter):
            checks.append(
                "FAILED: weights this small, as after few steps or held near 0, lose digits in fp16: export fp32"
            )
    except BadInput as fault:
        return Exported(export.name, path, size, 0, float("inf"), [], [f"FAILED: {fault}"])
    if "diffusers" in export.readers(adapter) and not any(check.startswith("FAILED") for check in checks):
        checks.append(read_by_diffusers(again, path))
    whole = not any(check.startswith("FAILED") for check in checks)
    return Exported(
        export.name, path, size, again.count, error, list(export.readers(adapter)) if whole else [], checks
    )


def _faint(adapter: Adapter) -> bool:
    """Whether most of some module's B is below 1e-4, where fp16 begins to lose bits (subnormal: below 6e-5)."""
    return any(float(b.abs().median()) < 1e-4 for _, _, _, b in adapter.modules())


def compare(trained: Adapter, again: Adapter, bound: float) -> tuple[float, list[str]]:
    """The largest relative error over the modules' deltas, and the checks that say so."""
    wanted, found = _by_place(trained), _by_place(again)
    if wanted.keys() != found.keys():
        odd = sorted(wanted.keys() ^ found.keys())
        return float("inf"), [f"FAILED: {len(odd)} modules differ, such as {' '.join(odd[0])}"]
    errors = {}
    for place, factors in wanted.items():  # one delta at a time: all of them are as large as the base
        right, value = delta(*factors, trained.scale), delta(*found[place], again.scale)
        if value.shape != right.shape:
            return float("inf"), [f"FAILED: {' '.join(place)} has shape {tuple(value.shape)}"]
        if not bool(torch.isfinite(value).all()):
            return float("inf"), [f"FAILED: {' '.join(place)} is not finite"]
        errors[place] = relative(value, right)
    worst = max(errors, key=lambda place: errors[place])
    line = f"{len(errors)} modules re-read, largest relative error {errors[worst]:.1e}"
    if errors[worst] > bound:
        return errors[worst], [f"FAILED: {line} in {' '.join(worst)} (bound {bound:.0e})"]
    return errors[worst], [f"ok: {line}"]


def _by_place(adapter: Adapter) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    return {(part, module): (a, b) for part, module, a, b in adapter.modules()}


def relative(found: Tensor, wanted: Tensor) -> float:
    scale = float(wanted.norm())
    return float((found - wanted).norm()) / scale if scale else float(found.norm())


@torch.no_grad()
def read_by_diffusers(adapter: Adapter, path: Path) -> str:
    """diffusers' load_lora_weights on a clean base against our own merge of the same file: what both predict."""
    family = families.load(str(adapter.base_folder))
    pipeline = family.pipeline()
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    theirs = probe(family)
    pipeline.unload_lora_weights()
    clean = probe(family)
    apply_adapter(family, adapter)
    ours = probe(family)
    moved = relative(clean, ours)
    error = relative(theirs, ours)
    line = f"diffusers reads it back: prediction error {error:.1e} (the adapter itself moves it by {moved:.1e})"
    return f"ok: {line}" if error <= max(PREDICTION_BOUND * moved, 1e-6) else f"FAILED: {line}"


def probe(family: Family) -> Tensor:
    """What a family predicts for one fixed prompt, noise and timestep, and its conditions: one flat vector."""
    side = family.resolution // family.latent_factor
    noise = torch.randn((1, family.latent_channels, side, side), generator=generator(0, "verify"))
    square = (family.resolution, family.resolution)
    cond = family.encode_prompts(["a photo of a small dog on the beach"])
    prediction = family.predict(noise, torch.tensor([500]), cond, [Geometry(square, (0, 0), square)])
    return torch.cat([prediction.float().flatten(), *(value.float().flatten() for value in cond.values())])


@torch.no_grad()
def apply_adapter(family: Family, adapter: Adapter, weight: float = 1.0) -> None:
    """Merges weight * scale * B A into the family's own weights."""
    for part, module, a, b in adapter.modules():
        modules = dict(family.parts[part].named_modules())
        target = modules.get(module) or modules[add_text_model(module)]
        change = delta(a, b, adapter.scale * weight).to(target.weight.device)
        target.weight += change.view_as(target.weight).to(target.weight.dtype)
