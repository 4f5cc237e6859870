"""What is no LoRA leaves as one: the best approximation of its true change at a rank, with the error that this costs.

UIs read DoRA, LoHa, LoKr and OFT differently or not at all; all read plain LoRA (docs/exports.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.errors import BadInput
from finetune.export.algebra import LAYERS, Decomposed, beyond_lora, decompose, differences
from finetune.export.base import Adapter, Exported
from finetune.export.peft import Peft
from finetune.export.verify import PREDICTION_BOUND, apply_adapter, probe, relative
from finetune.families.base import Family
from finetune.files import save_tensors, write_json
from finetune.methods.base import Method
from finetune.methods.peft_adapter import CONFIG, WEIGHTS, PeftAdapter, read_own_form
from finetune.progress import phase

MOST = 128  # the largest rank that is chosen unasked; the largest that LoRA files commonly have

Reload = Callable[[], Family]  # a clean base in the precision in which the training held it


@dataclass(frozen=True)
class Reduced:
    """A trained change as a LoRA; what it is worth, as check lines; and what the trained model predicts (`probe`)."""

    adapter: Adapter
    checks: list[str]
    prediction: Tensor


@torch.no_grad()
def reduced(method: Method, family: Family, reload: Reload, rank: int | None, max_error: float) -> Reduced:
    """The LoRA nearest to what was trained in `family`, whose parts go to the CPU and into fp32.

    Raises:
        BadInput: nothing was trained.
    """
    lost: list[str] = []
    if isinstance(method, PeftAdapter):
        found = _decompose(method.deltas(family), rank or MOST, sum(1 for _ in method.layers(family)))
    else:
        base = reload()
        layers = [child for part in base.export_prefix for child in base.parts[part].modules()]
        count = sum(isinstance(child, LAYERS) for child in layers)
        found = _decompose(differences(base, family), rank or MOST, count)
        lost = _not_held(*beyond_lora(base, family), found)
        del base
    if not found.spectra:
        raise BadInput("no linear layer and no convolution moved in this run: there is no LoRA to write")
    chosen = rank or min(found.rank_for(max_error), MOST)
    adapter = Adapter(family.name, family.folder, found.layers(chosen), 1.0)
    prediction = probe(_plain(family))
    return Reduced(adapter, [_bound(found, chosen, max_error), *lost], prediction)


def _decompose(deltas: Iterable[tuple[str, str, Tensor]], most: int, count: int) -> Decomposed:
    """With a progress bar: SDXL's 700 modules take minutes."""
    with phase("Singular values", count) as advance:

        def counted() -> Iterator[tuple[str, str, Tensor]]:
            for part, module, change in deltas:
                yield part, module, change
                advance(1, "")

        return decompose(counted(), most)


def with_checks(item: Exported, own: Reduced, reload: Reload) -> Exported:
    """A written LoRA's checks, and those of the approximation that it holds."""
    return replace(item, checks=[*item.checks, *own.checks, _predicted(own, reload)])


@torch.no_grad()
def _predicted(own: Reduced, reload: Reload) -> str:
    """The LoRA on a clean base against the trained model, by what both predict."""
    clean = _plain(reload())
    before = probe(clean)
    apply_adapter(clean, own.adapter)
    moved = float((own.prediction - before).norm())
    missed = float((own.prediction - probe(clean)).norm())
    share = missed / max(moved, 1e-30)
    return (
        f"ok: training moved a prediction by {relative(before, own.prediction):.1e}; the LoRA misses {share:.1%} of it"
    )


def _bound(found: Decomposed, rank: int, max_error: float) -> str:
    kept = found.kept(rank)
    line = (
        f"rank {rank} holds {kept.energy:.1%} of the change, error {kept.error:.3f} (worst {kept.worst:.2f} in "
        f"{kept.worst_module})"
    )
    if kept.error <= max_error:
        return f"ok: {line}"
    needed = found.rank_for(max_error)
    return (
        f"FAILED: {line}, more than export.max_error {max_error:g}: export.rank={needed} would meet it, or allow more "
        f"with export.max_error={_above(kept.error)}"
    )


def _above(error: float) -> str:
    """The error rounded up to two digits, as somebody would write it."""
    return f"{min(1.0, error + 0.005):.2f}"


def _not_held(count: int, change: float, found: Decomposed) -> list[str]:
    if not count:
        return []
    held = sum(float(s.double().square().sum()) for s in found.spectra.values())
    share = change**2 / max(change**2 + held, 1e-30)
    return [f"ok: {count} biases, norms and embeddings moved too ({share:.1%} of the change): no LoRA holds them"]


def _plain(family: Family) -> Family:
    """On the CPU, in fp32 and in eval mode: sums in bf16 would hide what training moved."""
    family.to("cpu")
    for part in family.parts.values():
        part.float().eval()
    return family


# the own form


@torch.no_grad()
def export_own_form(method: PeftAdapter, family: Family, path: Path, prediction: Tensor, reload: Reload) -> Exported:
    """Writes PEFT's own folder of any kind, in fp32, and lets PEFT read it on a clean base.

    In fp16 DoRA's magnitudes would lose what was learned: they are large, and move by little.
    """
    shutil.rmtree(path, ignore_errors=True)
    forms = method.own_form(family)
    for part, (config, tensors) in forms.items():
        save_tensors(path / part / WEIGHTS, tensors, {"format": "pt"})
        write_json(path / part / CONFIG, config)
    count = sum(1 for _ in method.layers(family))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    wanted = {part: {name: value.cpu() for name, value in tensors.items()} for part, (_, tensors) in forms.items()}
    try:
        checks = [_same_tensors(path, wanted), _read_by_peft(path, prediction, reload)]
    except BadInput as fault:
        checks = [f"FAILED: {fault}"]
    ok = not any(check.startswith("FAILED") for check in checks)
    return Exported(Peft.name, path, size, count, 0.0 if ok else float("inf"), ["peft"] if ok else [], checks)


def _same_tensors(path: Path, wanted: dict[str, dict[str, Tensor]]) -> str:
    for part, tensors in wanted.items():
        found = load_file(path / part / WEIGHTS)
        odd = sorted(found.keys() ^ tensors.keys())
        odd += [name for name in tensors.keys() & found.keys() if not torch.equal(tensors[name], found[name])]
        if odd:
            return f"FAILED: {part} {odd[0]} is not what was trained"
    return f"ok: {sum(map(len, wanted.values()))} tensors re-read, bit for bit (in fp32, whatever export.dtype is)"


def _read_by_peft(path: Path, prediction: Tensor, reload: Reload) -> str:
    clean = _plain(reload())
    before = probe(clean)
    read_own_form(clean, path)
    error, moved = relative(probe(_plain(clean)), prediction), relative(before, prediction)
    line = f"peft reads it back: prediction error {error:.1e} (the adapter itself moves it by {moved:.1e})"
    return f"ok: {line}" if error <= max(PREDICTION_BOUND * moved, 1e-6) else f"FAILED: {line}"


def own_formats(method: Method, formats: Sequence[str]) -> tuple[list[str], bool]:
    """The formats that are written as plain LoRA, and whether the method's own form is wanted too."""
    own = isinstance(method, PeftAdapter) and Peft.name in formats
    return [item for item in formats if not (own and item == Peft.name)], own
