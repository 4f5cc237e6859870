"""Exports other methods as LoRA: the best low-rank approximation of the trained change, with its error.

UIs read DoRA, LoHa, LoKr and OFT differently or not at all, but all read plain LoRA (docs/exports.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.core.devices import exact_device
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.files import save_tensors, write_json
from finetune.core.records import Check
from finetune.core.rng import generator
from finetune.export.base import Adapter, Exported, unchecked
from finetune.export.bench import Bench, discard, full_fp32
from finetune.export.decompose import LAYERS, Decomposed, Difference, beyond, decompose, unloaded_base
from finetune.export.lora.peft import Peft
from finetune.export.verify import BOUNDS, merged, moved_check, probe, relative, same_prediction
from finetune.families.base import Family
from finetune.methods.base import Method
from finetune.methods.peft_adapter import CONFIG, WEIGHTS, PeftAdapter, read_native_form

MOST = 128  # the largest rank that is chosen automatically: LoRA files rarely have a larger one

Places = dict[tuple[str, str], Tensor]  # (part, module path) -> a tensor of that module


@dataclass(frozen=True)
class Reduced:
    """A trained change as a LoRA, the checks of the approximation, and the trained model's prediction (`probe`)."""

    adapter: Adapter
    checks: list[Check]
    prediction: Tensor


@torch.no_grad()
def reduced(method: Method, family: Family, bench: Bench, rank: int | None, max_error: float) -> Reduced:
    """The LoRA closest to the change that was trained in `family`. Puts the family's parts into eval mode.

    `rank`: the rank; None for the smallest that meets `max_error`, the allowed |LoRA - change| / |change|.

    Raises:
        BadInput: no linear layer and no convolution changed.
    """
    lost: list[Check] = []
    if isinstance(method, PeftAdapter):
        found = _decompose(_deltas(method, family), rank or MOST, sum(1 for _ in method.layers(family)))
    else:
        moved = Difference(unloaded_base(family, bench.dtype), family)
        layers = [child for part in family.trainable_parts() for child in family.parts[part].modules()]
        found = _decompose(moved.layers(), rank or MOST, sum(isinstance(child, LAYERS) for child in layers))
        lost = _not_held(moved, found)
    if not found.spectra:
        raise BadInput(
            "training changed no linear layer and no convolution, so there is no LoRA to write: train for more steps"
        )
    chosen = rank or min(found.rank_for(max_error), MOST)
    adapter = Adapter(family.name, family.folder, found.layers(chosen), 1.0)
    with full_fp32():
        prediction = probe(_settled(family))
    return Reduced(adapter, [_bound(found, chosen, max_error), *lost], prediction)


def _deltas(method: PeftAdapter, family: Family) -> Iterator[tuple[str, str, Tensor]]:
    """`method.deltas`, computed on a device with float64, which some methods need."""
    for part, path, layer in method.layers(family):
        device = next(layer.parameters()).device
        layer.to(exact_device(device))
        with torch.no_grad():
            change = method.delta(layer)
        layer.to(device)
        yield part, path, change


def _decompose(deltas: Iterable[tuple[str, str, Tensor]], most: int, count: int) -> Decomposed:
    """`decompose` with a progress bar: SDXL's 700 modules take minutes."""
    with phase("Singular values", count, "modules") as advance:

        def counted() -> Iterator[tuple[str, str, Tensor]]:
            for part, module, change in deltas:
                yield part, module, change
                advance(1, "")

        return decompose(counted(), most)


def with_checks(items: Sequence[Exported], own: Reduced, bench: Bench) -> list[Exported]:
    """Adds the approximation's checks to those of the written LoRAs, which hold the same matrices. With
    `export.verify: off`, only a failed export.max_error is added: that error is known already."""
    added = list(own.checks)
    if bench.verify == "off":
        added = [check for check in own.checks if not check.passed]
    if bench.verify == "full" and items:
        added.append(_predicted(own, bench))
    return [replace(item, checks=[*item.checks, *added]) for item in items]


@torch.no_grad()
def _predicted(own: Reduced, bench: Bench) -> Check:
    """Compares the prediction of the LoRA on a clean base with that of the trained model."""
    with bench.lent() as clean:
        before = bench.prediction(probe)
        with merged(clean, own.adapter):
            after = probe(clean)
    moved = float((own.prediction - before).norm())
    missed = float((own.prediction - after).norm())
    share = missed / max(moved, 1e-30)
    line = (
        f"training changed a prediction by {relative(before, own.prediction):.1e}; the LoRA misses {share:.1%} of it"
    )
    if bench.dtype != torch.float32:
        line += f" (in {bench.precision}, including its rounding)"
    return Check("prediction", bool(torch.isfinite(after).all()), line, share)


def _bound(found: Decomposed, rank: int, max_error: float) -> Check:
    kept = found.kept(rank)
    line = (
        f"rank {rank} holds {kept.energy:.1%} of the change, error {kept.error:.3f} (worst {kept.worst:.2f} in "
        f"{kept.worst_module})"
    )
    if kept.error <= max_error:
        return Check("rank", True, line, kept.error)
    needed = found.rank_for(max_error)
    line += (
        f", more than export.max_error {max_error:g}: export.rank={needed} would meet it, or allow more with "
        f"export.max_error={_above(kept.error)}"
    )
    return Check("rank", False, line, kept.error)


def _above(error: float) -> str:
    """The error rounded up to two digits, as a value for a recipe."""
    return f"{min(1.0, error + 0.005):.2f}"


def _not_held(moved: Difference, found: Decomposed) -> list[Check]:
    line, share = beyond(moved, found)
    return [Check("not-held", True, line, share)] if line else []


def _settled(family: Family) -> Family:
    for part in family.parts.values():
        part.eval()
    return family


# PEFT's own format of the method


@torch.no_grad()
def export_native_form(method: PeftAdapter, family: Family, path: Path, prediction: Tensor, bench: Bench) -> Exported:
    """Writes a PEFT folder of any kind in fp32, and checks it with PEFT's reader on a clean base. The clean base
    replaces `family` in memory.

    fp32, because DoRA's magnitudes are large and change little: fp16 would round the change away.
    """
    shutil.rmtree(path, ignore_errors=True)
    forms = method.native_form(family)
    for part, (config, tensors) in forms.items():
        save_tensors(path / part / WEIGHTS, tensors, {"format": "pt"})
        write_json(path / part / CONFIG, config)
    if bench.verify == "off":
        return unchecked(Peft.name, path, method.adapted_modules(family))
    wanted = {part: {name: value.cpu() for name, value in tensors.items()} for part, (_, tensors) in forms.items()}
    with full_fp32():
        shadows = _shadows(method, family)
    discard(family)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    try:
        checks = [_same_tensors(path, wanted)]
        if bench.verify == "full":
            checks.append(_read_by_peft(method, path, shadows, prediction, bench))
    except BadInput as fault:
        checks = [Check("file", False, str(fault))]
    ok = all(check.passed for check in checks)
    return Exported(Peft.name, path, size, len(shadows), 0.0 if ok else float("inf"), ["peft"] if ok else [], checks)


def _shadows(method: PeftAdapter, family: Family) -> Places:
    """Each module's delta times a random vector: small enough to keep for every module, and different for different
    deltas."""
    found = {}
    for part, path, change in _deltas(method, family):
        matrix = change.flatten(1)
        vector = torch.randn(matrix.shape[1], generator=generator(0, "shadow"))
        found[part, path] = (matrix @ vector.to(matrix.device)).cpu()
    return found


def _same_tensors(path: Path, wanted: dict[str, dict[str, Tensor]]) -> Check:
    for part, tensors in wanted.items():
        found = load_file(path / part / WEIGHTS)
        odd = sorted(found.keys() ^ tensors.keys())
        odd += [name for name in tensors.keys() & found.keys() if not torch.equal(tensors[name], found[name])]
        if odd:
            return Check("weights", False, f"{part} {odd[0]} differs from the trained tensor")
    count = sum(map(len, wanted.values()))
    return Check("weights", True, f"{count} tensors re-read, bit for bit (in fp32, whatever export.dtype is)", 0.0)


def _read_by_peft(method: PeftAdapter, path: Path, wanted: Places, prediction: Tensor, bench: Bench) -> Check:
    """Compares every module's delta and the prediction after PEFT's own reader loaded the folder into a clean base."""
    with bench.clean() as clean:
        before = probe(clean)
        read_native_form(clean, path)
        found, theirs = _shadows(method, clean), probe(_settled(clean))
        fault = _other_deltas(found, wanted)
        if fault:
            return Check("peft", False, f"peft reads another adapter: {fault}")
        if bench.dtype != torch.float32:
            good = Check("peft", True, f"peft reads it back: {len(found)} modules with the trained deltas")
            return moved_check(good, before, theirs, bench, lambda: _strength(method, clean))
    error, moved = relative(theirs, prediction), relative(before, prediction)
    line = f"peft reads it back: prediction error {error:.1e} (the adapter itself moves it by {moved:.1e})"
    return Check("peft", same_prediction(error, moved), line, error)


def _strength(method: PeftAdapter, family: Family) -> float:
    """The largest |delta| / |weight| of a module."""
    weights = [layer.get_base_layer().weight.float().norm() for _, _, layer in method.layers(family)]
    changes = [change.norm() for _, _, change in _deltas(method, family)]
    return max(float(change) / float(weight) for change, weight in zip(changes, weights, strict=True))


def _other_deltas(found: Places, wanted: Places) -> str:
    """What is wrong with the modules' deltas; "" if nothing."""
    missing = sorted(found.keys() ^ wanted.keys())
    wrong = [f"{' '.join(place)} is not in both" for place in missing]
    for place in found.keys() & wanted.keys():
        error = relative(found[place], wanted[place])
        if not error <= BOUNDS[torch.float32]:
            wrong.append(f"{' '.join(place)} has error {error:.1e}")
    return f"{len(wrong)} of {len(wanted)} modules differ, such as {wrong[0]}" if wrong else ""


def native_formats(method: Method, formats: Sequence[str]) -> tuple[list[str], bool]:
    """The formats that are written as plain LoRA, and whether the method's own PEFT format is wanted too."""
    own = isinstance(method, PeftAdapter) and Peft.name in formats
    return [item for item in formats if not (own and item == Peft.name)], own
