"""Exports adapters of other kinds than LoRA in a format of their own, and checks the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.core.devices import doubled
from finetune.core.errors import BadInput
from finetune.core.records import Check
from finetune.export.base import Exported, NativeExport, Request, unchecked
from finetune.export.bench import Bench, full_fp32
from finetune.export.verify import moved_check, probe, relative, same_prediction
from finetune.families.base import Family
from finetune.families.naming.clip import strip_text_model
from finetune.methods.peft_adapter import PeftAdapter

BOUND = 1e-6  # |read - trained| / |trained| of a module's weight; files are in fp32


@torch.no_grad()
def trained_prediction(family: Family) -> Tensor:
    """The trained model's prediction (`probe`). Puts the family's parts into eval mode."""
    for part in family.parts.values():
        part.eval()
    with full_fp32():
        return probe(family)


@torch.no_grad()
def export_native(
    export: NativeExport, method: PeftAdapter, family: Family, request: Request, checked: bool = True
) -> Exported:
    """Writes the adapter in `family`, reads the file again and compares every module's weight with the trained one.

    The check uses `export.change`, which knows nothing of PEFT. `checked`: False only writes.
    """
    path = export.path(request.folder, request.name, family.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    export.write(method, family, path, request)
    count = method.adapted_modules(family)
    if not checked:
        return unchecked(export.name, path, count)
    try:
        error, check = _compared(export, method, family, path)
    except BadInput as fault:
        error, check = float("inf"), Check("file", False, str(fault))
    readers, limits = [], []
    if check.passed:
        readers, limits = list(export.readers(method, family.name)), export.limits(method, family.name)
    return Exported(export.name, path, path.stat().st_size, count, error, readers, [check], limits)


def _compared(export: NativeExport, method: PeftAdapter, family: Family, path: Path) -> tuple[float, Check]:
    """The largest error of a module, relative to its trained weight; for methods that add to the weight, to its
    change."""
    held = export.read(path, family)
    worst, where = 0.0, ""
    for part, module, layer in method.layers(family):
        if (part, module) not in held:
            return float("inf"), Check("weights", False, f"{part} {module} is missing")
        weight, wanted = layer.get_base_layer().weight, method.delta(layer)
        found = export.change(held.pop((part, module)), weight).to(wanted.device)
        scale = wanted if export.adds(method) else doubled(weight) + doubled(wanted)
        error = float(doubled(found - wanted).norm() / scale.norm().clamp(min=1e-30))
        if not error <= worst:
            worst, where = error, f"{part} {module}"
    if held:
        return float("inf"), Check("weights", False, f"{' '.join(next(iter(held)))} is not in the adapter")
    of = "change" if export.adds(method) else "weight"
    line = f"{method.adapted_modules(family)} modules re-read, largest error {worst:.1e} of the trained {of}"
    passed = worst <= BOUND
    return worst, Check("weights", passed, line if passed else f"{line} in {where} (bound {BOUND:.0e})", worst)


@torch.no_grad()
def with_prediction(item: Exported, export: NativeExport, prediction: Tensor, bench: Bench) -> Exported:
    """Adds a check: the file on a clean base predicts what the trained model does (`prediction`)."""
    if bench.verify != "full" or not item.ok:
        return item
    with bench.clean() as clean:
        before = probe(clean)
        strength = open_native(export, item.path, clean)
        theirs = probe(clean)
    if bench.dtype == torch.float32:
        error, moved = relative(theirs, prediction), relative(before, prediction)
        line = f"on a clean base: prediction error {error:.1e} (the adapter itself moves it by {moved:.1e})"
        check = Check("prediction", same_prediction(error, moved), line, error)
    else:
        good = Check("prediction", True, "its weights were put into a clean base")
        check = moved_check(good, before, theirs, bench, lambda: strength)
    return replace(item, checks=[*item.checks, check], read_by=item.read_by if check.passed else [])


@torch.no_grad()
def open_native(export: NativeExport, path: Path, family: Family) -> float:
    """Adds the file's changes to a clean family's weights; returns the largest |change| / |weight| of a module."""
    largest = 0.0
    modules = {part: _by_path(family.parts[part]) for part in family.naming.prefixes}
    for (part, module), tensors in export.read(path, family).items():
        target = modules[part][module].weight
        assert isinstance(target, Tensor)
        change = export.change(tensors, target).to(target.device)
        largest = max(largest, float(change.norm() / target.float().norm()))
        target.copy_(target.float() + change)
    return largest


def _by_path(part: nn.Module) -> dict[str, nn.Module]:
    return {strip_text_model(path): child for path, child in part.named_modules()}
