"""Verifies exported adapters: reads each file back and compares it with the trained adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.core.batch import Geometry
from finetune.core.errors import BadInput
from finetune.core.records import Check
from finetune.core.rng import generator
from finetune.export.base import Adapter, AdapterExport, Exported, delta, unchecked, widened
from finetune.export.bench import Bench
from finetune.families.base import Family
from finetune.families.naming.clip import add_text_model
from finetune.methods.peft_adapter import active_lora

# bounds for the relative error of a delta, whose B and A are each rounded once
BOUNDS: dict[torch.dtype, float] = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PREDICTION_BOUND = 1e-4  # two readers of one file may compute in another order in fp32
FP64_ROUNDING = 1e-7  # some layers compute in fp32 even then (norms of SD3)
PROBED_SIDE = 32  # latents: the prediction of a larger image costs more and proves no more
TOO_FAINT = "changes as small as these lose digits in fp16: export in fp32"


@dataclass(frozen=True)
class Injected:
    """What another program loaded into a base: a summary for the check's message, and the fault ("" for none)."""

    held: str
    fault: str


def verify(adapter: Adapter, export: AdapterExport, path: Path, dtype: torch.dtype, bench: Bench) -> Exported:
    """Reads a written file back and compares it with the trained deltas, by our reader and by an independent one."""
    if bench.verify == "off":
        return unchecked(export.name, path, adapter.count)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    try:
        again = export.read(path, adapter.family, adapter.base_folder)
        error, checks = compare(adapter, again, BOUNDS[dtype])
        if BOUNDS[dtype] < error and dtype == torch.float16 and _faint(adapter):
            checks.append(Check("precision", False, TOO_FAINT))
    except BadInput as fault:
        return Exported(export.name, path, size, 0, float("inf"), [], [Check("file", False, str(fault))])
    theirs = bench.verify == "full" and "diffusers" in export.readers(adapter)
    if theirs and all(check.passed for check in checks):
        checks.append(read_by_diffusers(adapter, again, path, dtype, bench))
    whole = all(check.passed for check in checks)
    readers, limits = (list(export.readers(adapter)), export.limits(adapter)) if whole else ([], [])
    return Exported(export.name, path, size, again.count, error, readers, checks, limits)


def _faint(adapter: Adapter) -> bool:
    """Whether any module has most of its B below 1e-4: fp16 loses bits there (it is subnormal below 6e-5)."""
    return any(float(b.abs().median()) < 1e-4 for _, _, _, b in adapter.modules())


def compare(trained: Adapter, again: Adapter, bound: float) -> tuple[float, list[Check]]:
    """The largest relative error of a module's delta, and the checks with the result."""
    wanted, found = _by_place(trained), _by_place(again)
    if wanted.keys() != found.keys():
        odd = sorted(wanted.keys() ^ found.keys())
        return float("inf"), [Check("weights", False, f"{len(odd)} modules differ, such as {' '.join(odd[0])}")]
    errors = {}
    for place, factors in wanted.items():  # one delta at a time: all together are as large as the base
        right, value = delta(*factors, trained.scale), delta(*found[place], again.scale)
        if value.shape != right.shape:
            return float("inf"), [Check("weights", False, f"{' '.join(place)} has shape {tuple(value.shape)}")]
        if not bool(torch.isfinite(value).all()):
            return float("inf"), [Check("weights", False, f"{' '.join(place)} is not finite")]
        errors[place] = relative(value, right)
    worst = max(errors, key=lambda place: errors[place])
    line = f"{len(errors)} modules re-read, largest relative error {errors[worst]:.1e}"
    passed = errors[worst] <= bound
    where = "" if passed else f" in {' '.join(worst)} (bound {bound:.0e})"
    return errors[worst], [Check("weights", passed, f"{line}{where}", errors[worst])]


def _by_place(adapter: Adapter) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    return {(part, module): (a, b) for part, module, a, b in adapter.modules()}


def relative(found: Tensor, wanted: Tensor) -> float:
    scale = float(wanted.norm())
    return float((found - wanted).norm()) / scale if scale else float(found.norm())


@torch.no_grad()
def read_by_diffusers(trained: Adapter, again: Adapter, path: Path, dtype: torch.dtype, bench: Bench) -> Check:
    """Loads the file into a clean base with diffusers' load_lora_weights, and compares its deltas with `trained`.

    In fp32 its prediction must also equal that of our own merge of the file (`again`, stored in `dtype`). If it does
    not, both are computed again in fp64: a base can make much of the last digit. In bf16 and fp16, rounding can change
    a prediction as much as a fault does: there the prediction must only be finite, and differ from the base's.
    """
    bound = max(BOUNDS[dtype], BOUNDS[bench.dtype])
    with bench.lent() as family:
        clean = bench.prediction(probe)
        with loaded(family, path):
            faint = again if bench.dtype == torch.float16 and _faint(again) else None
            injected = _compare_injected(trained, faint, family, bound)
            theirs = probe(family)
        if injected.fault:
            return Check("diffusers", False, f"diffusers reads another adapter: {injected.fault}")
        if bench.dtype != torch.float32:
            found = Check("diffusers", True, f"diffusers reads it back: {injected.held}")
            return moved_check(found, clean, theirs, bench, lambda: _strength(family, trained))
        with merged(family, again):
            ours = probe(family)
        error, moved, where = relative(theirs, ours), relative(clean, ours), ""
        passed = same_prediction(error, moved)
        if not passed and has_fp64(family.device):
            error, where = error_in_fp64(family, again, path), " in fp64"
            passed = error <= max(PREDICTION_BOUND * moved, FP64_ROUNDING)
    line = f"diffusers reads it back: prediction error {error:.1e}{where} (the adapter itself moves it by {moved:.1e})"
    return Check("diffusers", passed, f"{line}; {injected.held}", error)


@contextmanager
def loaded(family: Family, path: Path) -> Iterator[None]:
    """Inside the block, diffusers' pipeline of `family` has the adapter file loaded."""
    pipeline = family.drawing.pipeline()
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    try:
        yield
    finally:
        pipeline.unload_lora_weights()


def has_fp64(device: torch.device) -> bool:
    return device.type != "mps"


@torch.no_grad()
def error_in_fp64(family: Family, again: Adapter, path: Path) -> float:
    """The relative difference of two predictions in fp64: by diffusers with the file, and by our merge of `again`.

    Needs twice the memory of the fp32 weights. They are the same afterwards.
    """
    parts = [family.parts[name] for name in family.parts if name != "vae"]
    try:
        with loaded(family, path):
            _to(parts, torch.float64)
            theirs = probe(family)
        with merged(family, again):
            ours = probe(family)
    finally:
        _to(parts, torch.float32)
    return relative(theirs, ours)


def _to(parts: Sequence[torch.nn.Module], dtype: torch.dtype) -> None:
    for part in parts:
        part.to(dtype)


def same_prediction(error: float, moved: float) -> bool:
    """Whether two readers of a file predict the same. `moved`: how much the adapter changes a prediction."""
    return error <= max(PREDICTION_BOUND * moved, 1e-6)


def _compare_injected(trained: Adapter, faint: Adapter | None, family: Family, bound: float) -> Injected:
    """Compares the deltas of PEFT's layers in `family` with the trained ones.

    `faint`: the stored adapter, if fp16 can't hold all of its values. Then a delta may also equal the stored one.
    """
    parts = family.naming.prefixes
    found = {(part, path): (a, b, k) for part in parts for path, a, b, k in active_lora(family.parts[part])}
    wanted = _by_place(trained)
    stored = _by_place(faint) if faint else {}
    wrong, worst = [], 0.0
    for place, pair in wanted.items():
        if place not in found:
            wrong.append(f"{' '.join(place)} is missing")
            continue
        a, b, scale = found.pop(place)
        value, right = delta(a, b, scale), _rounded(pair, a.device, torch.float32, trained.scale)
        if value.shape != right.shape:
            wrong.append(f"{' '.join(place)} has shape {tuple(value.shape)}")
            continue
        error = relative(value, right)
        worst = max(worst, error)
        if not error <= bound and faint is not None:
            error = relative(value, _rounded(stored[place], a.device, torch.float16, faint.scale))
        if not error <= bound:
            wrong.append(f"{' '.join(place)} has error {error:.1e} (bound {bound:.0e})")
    wrong += [
        f"{' '.join(place)} is not in the adapter" for place, (a, b, _) in found.items() if bool(delta(a, b, 1).any())
    ]
    fault = f"{len(wrong)} of {len(wanted)} modules differ, such as {wrong[0]}" if wrong else ""
    return Injected(f"{len(wanted)} modules, largest relative error {worst:.1e}", fault)


def _rounded(pair: tuple[Tensor, Tensor], device: torch.device, dtype: torch.dtype, scale: float) -> Tensor:
    a, b = (factor.to(device, dtype) for factor in pair)
    return delta(a, b, scale)


def moved_check(found: Check, clean: Tensor, theirs: Tensor, bench: Bench, strength: Callable[[], float]) -> Check:
    """Completes the passed check `found` in precisions in which predictions can't be compared closely.

    `strength`: the largest |delta| / |weight| of a module. It decides whether the prediction has to change.
    """
    line = found.message
    if not bool(torch.isfinite(theirs).all()):
        return replace(found, passed=False, message=f"{line}, but its prediction in {bench.precision} is not finite")
    moved = relative(theirs, clean)
    if moved:
        return replace(found, message=f"{line} (in {bench.precision}; it moves a prediction by {moved:.1e})")
    if strength() > torch.finfo(bench.dtype).eps:
        return replace(
            found, passed=False, message=f"{line}, but in {bench.precision} it does not change the prediction"
        )
    return replace(found, message=f"{line} (in {bench.precision}, where it is too small to change a prediction)")


def _strength(family: Family, adapter: Adapter) -> float:
    """The largest |delta| / |weight| of a module; `family` must be clean."""
    modules = {part: dict(family.parts[part].named_modules()) for part in adapter.layers}
    return max(
        float(delta(a, b, adapter.scale).norm() / _find(modules[part], module).weight.float().norm().cpu())
        for part, module, a, b in adapter.modules()
    )


def _find(modules: Mapping[str, Any], path: str) -> Any:
    return modules.get(path) or modules[add_text_model(path)]


def probe(family: Family) -> Tensor:
    """The conditions and the prediction of a family for one fixed prompt, noise and timestep, as one flat vector."""
    return predicted(family, family.encode_prompts(["a photo of a small dog on the beach"]))


def predicted(family: Family, cond: dict[str, Tensor]) -> Tensor:
    """The conditions, and the prediction for one fixed noise and timestep, as one vector on the denoiser's device.

    Latents are at most 32x32: every weight takes part in each of them.
    """
    device = family.device
    side = min(family.resolution // family.codec.factor, PROBED_SIDE)
    noise = torch.randn((1, family.codec.channels, side, side), generator=generator(0, "verify")).to(device)
    square = (side * family.codec.factor, side * family.codec.factor)
    prediction = family.predict(noise, torch.tensor([500], device=device), cond, [Geometry(square, (0, 0), square)])
    return torch.cat([widened(value).flatten() for value in (prediction, *cond.values())])


@torch.no_grad()
def apply_adapter(family: Family, adapter: Adapter, weight: float = 1.0) -> None:
    """Adds weight * scale * B A to the family's own weights, in place. The sum is computed in fp32 and rounded
    once."""
    for target, a, b in _targets(family, adapter):
        target.weight.copy_(_sum(target.weight, a, b, adapter.scale * weight))


@contextmanager
def merged(family: Family, adapter: Adapter) -> Iterator[None]:
    """Inside the block, the family computes with the weights that `apply_adapter` would give it, and it has its own
    again afterwards. A module has its sum only while it computes, so that no second copy of the base is in memory."""
    with ExitStack() as undo:
        for target, a, b in _targets(family, adapter):
            own = target.weight.data
            put = partial(_put_sum, own=own, pair=(a, b), scale=adapter.scale)
            undo.callback(target.register_forward_pre_hook(put).remove)
            undo.callback(target.register_forward_hook(partial(_put_back, own=own), always_call=True).remove)
        yield


def _targets(family: Family, adapter: Adapter) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """(module of the family, A, B) of every module of the adapter."""
    modules = {part: dict(family.parts[part].named_modules()) for part in adapter.layers}
    for part, module, a, b in adapter.modules():
        yield _find(modules[part], module), a, b


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight + scale * B A, in the precision of the weight."""
    wide = widened(weight)
    change = delta(a.to(wide.dtype), b.to(wide.dtype), scale).to(weight.device)
    return (wide + change.view_as(weight)).to(weight.dtype)


def _put_sum(module: Any, inputs: Any, own: Tensor, pair: tuple[Tensor, Tensor], scale: float) -> None:
    module.weight.data = _sum(own, *pair, scale)


def _put_back(module: Any, inputs: Any, output: Any, own: Tensor) -> None:
    module.weight.data = own
