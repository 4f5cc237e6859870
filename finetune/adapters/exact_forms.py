"""Checks LoHa, LoKr and DoRA files in LyCORIS' format: names, shapes and values. They are not read as a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from finetune.adapters.bases import BASE_HASH, accepted_names, chosen_base, weight_of
from finetune.adapters.checks import another_base, header_family
from finetune.adapters.faults import EFFECTS, NO_ALPHA
from finetune.adapters.keys import OTHERS
from finetune.adapters.pairs import Faulty, pair_of
from finetune.adapters.result import Inspection, dtype_name
from finetune.export.lora.kohya import Place
from finetune.export.lora.lycoris import module_names
from finetune.families.naming.base import LYCORIS, PROGRAMS, UNKNOWN, Verdict
from finetune.families.registry import FAMILIES, weight_shapes

Held = Mapping[str, Tensor]  # one module's tensors by their names after its own
DOWN, UP, SCALE = "lora_down.weight", "lora_up.weight", "dora_scale"
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w2")
NAMES = {
    "DoRA": (DOWN, UP, SCALE),
    "LoHa": LOHA,
    "LoKr": (*LOKR, *(f"{name}_{side}" for name in LOKR for side in "ab")),
}
ALPHA = "alpha"
FAULTY: Verdict = ("unknown", "not established for such a file with faults")
OTHER_NAMES: Verdict = ("unknown", "not established for these names of modules")
TWO_RULES: Verdict = ("unknown", "trainers write dora_scale for two different norms: the header does not say which")


@dataclass
class Native:
    """The tensors of a file by module. `method`: "DoRA", "LoHa" or "LoKr". `odd`: keys that are not of it."""

    method: str
    held: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, dict[str, torch.Size]]:
        """Module -> the sizes of its input ("a") and output ("b") as a LoRA of rank 1 would have them."""
        return {name: _shape(self.method, held) for name, held in self.held.items()}


def native_of(tensors: Mapping[str, Tensor]) -> Native | None:
    """The tensors of a file of one of these methods; None if it holds anything of other methods or of plain LoRA."""
    methods = {OTHERS[ending] for key in tensors for ending in OTHERS if key.endswith(ending)}
    if len(methods) != 1 or not methods <= NAMES.keys():
        return None
    found = Native(methods.pop())
    for key, value in tensors.items():
        name, _, role = key.partition(".")
        if role in (*NAMES[found.method], ALPHA):
            found.held.setdefault(name, {})[role] = value
        elif key.endswith(tuple(OTHERS)) or role in (DOWN, UP):
            return None
        else:
            found.odd.append(key)
    lone = [name for name, held in found.held.items() if held.keys() == {ALPHA}]
    found.odd += [f"{name}.{ALPHA}" for name in lone]
    found.held = {name: held for name, held in found.held.items() if name not in lone}
    plain = any(SCALE not in held for held in found.held.values())
    return None if found.method == "DoRA" and plain else found


def inspect_native(
    path: Path, native: Native, tensors: Held, metadata: dict[str, str], base: str | None
) -> Inspection:
    """Checks such a file against a base, as `inspect_adapter` does.

    Raises:
        BadInput: the file does not tell for which base it is.
    """
    compared = chosen_base(path, native.shapes, metadata, base)
    own = set(module_names(compared.folder).values())
    names = accepted_names(compared.folder, native=True)
    known = {name: names[name] for name in native.held if name in names}
    found = Inspection(
        path=path,
        kind="lycoris",
        compared=compared,
        family=compared.family,
        dtypes=tuple(sorted({dtype_name(value) for key, value in tensors.items() if not key.endswith(f".{ALPHA}")})),
        size=path.stat().st_size,
        metadata=metadata,
        native=native.method,
        unknown_keys=sorted(native.odd) + sorted(native.held.keys() - known.keys()),
    )
    sizes = _check_modules(found, native, known)
    another_base(found, native.shapes, sizes, found.parts.total())
    header_family(found)
    found.verdicts = _verdicts(found, native.held.keys() <= own)
    return found


def _check_modules(found: Inspection, native: Native, known: Mapping[str, Place]) -> dict[str, tuple[str, str]]:
    """Records each module's part, rank and scale, or its fault. Returns those of other sizes than in the base."""
    weights = weight_shapes(found.compared.folder)
    sizes: dict[str, tuple[str, str]] = {}
    for name, place in sorted(known.items()):
        held = native.held[name]
        try:
            rank = _rank(native.method, held, weight_of(place, weights))
        except Faulty as error:
            found.fault(error.fault, name, of=error.of)
            sizes |= {name: error.sizes} if error.sizes else {}
            continue
        found.parts[place.part] += 1
        if rank is not None:
            found.ranks[rank] += 1
            if ALPHA in held:
                found.scales[round(float(held[ALPHA]) / rank, 6)] += 1
            else:
                found.fault(NO_ALPHA, name)
        if native.method != "DoRA" and not all(bool(held[role].any()) for role in held if role != ALPHA):
            found.zero.append(name)
    return sizes


def _rank(method: str, held: Held, weight: torch.Size) -> int | None:
    """A module's rank (the largest, if it has two); None if its matrices are whole.

    Raises:
        Faulty: a tensor is missing, has a wrong shape, or holds what is no number.
    """
    missing = next((role for role in _needed(method, held) if role not in held), None)
    if missing is not None:
        raise Faulty("one-matrix", missing)
    if not all(value.is_floating_point() for value in held.values()):
        raise Faulty("not-floating")
    if held.get(ALPHA, torch.ones(1)).numel() != 1:
        raise Faulty("another-shape")
    rank = _of_dora(held, weight) if method == "DoRA" else _of_product(method, held, weight)
    if not all(bool(torch.isfinite(value).all()) for value in held.values()):
        raise Faulty("not-finite")
    return rank


def _needed(method: str, held: Held) -> list[str]:
    if method != "LoKr":
        return list(NAMES[method])
    halves = {name: [f"{name}_a", f"{name}_b"] for name in LOKR}
    return [role for name in LOKR for role in (halves[name] if held.keys() & set(halves[name]) else [name])]


def _of_dora(held: Held, weight: torch.Size) -> int:
    """`dora_scale` has a value for each output, or in files of other trainers for each input."""
    pair_of({"a": held[DOWN], "b": held[UP]}, weight)
    scale = held[SCALE]
    per_output = scale.ndim > 0 and len(scale) == scale.numel() == weight[0]
    if not per_output and not (scale.ndim > 1 and len(scale) == 1 and scale.numel() == weight[1]):
        raise Faulty("another-shape")
    return len(held[DOWN])


def _of_product(method: str, held: Held, weight: torch.Size) -> int | None:
    inner = [(held[role], held[f"{role[:-1]}b"]) for role in held if role.endswith("_a")]
    if any(value.ndim < 2 or not value.numel() for role, value in held.items() if role != ALPHA):
        raise Faulty("another-shape")
    if any(a.ndim != 2 or b.ndim != 2 or a.shape[1] != len(b) for a, b in inner):
        raise Faulty("another-shape")
    if method == "LoHa" and (len({a.shape for a, _ in inner}) > 1 or len({b.shape for _, b in inner}) > 1):
        raise Faulty("another-shape")
    shape = _shape(method, held)
    size, wanted = (shape["a"][1:].numel(), shape["b"][0]), (weight[1:].numel(), weight[0])
    if size != wanted:
        raise Faulty("another-shape", sizes=(f"{size[0]} to {size[1]}", f"{wanted[0]} to {wanted[1]}"))
    return max((len(b) for _, b in inner), default=None)


def _shape(method: str, held: Held) -> dict[str, torch.Size]:
    """The sizes of a module's input ("a") and output ("b"), as far as its tensors tell."""
    if method == "DoRA":
        return {side: held[role].shape for side, role in (("a", DOWN), ("b", UP)) if role in held}
    if method == "LoHa":
        sides = {"a": (LOHA[1], LOHA[3]), "b": (LOHA[0], LOHA[2])}
        return {side: held[role].shape for side, roles in sides.items() for role in roles if role in held}
    small, big = (_factor(held, name) for name in LOKR)
    if small is None or big is None:
        return {}
    return {"a": torch.Size([1, small[1] * big[1]]), "b": torch.Size([small[0] * big[0], 1])}


def _factor(held: Held, name: str) -> tuple[int, int] | None:
    """(rows, columns) of one of LoKr's two matrices, with a kernel in the columns."""
    whole, up, down = (held.get(key) for key in (name, f"{name}_a", f"{name}_b"))
    if whole is not None:
        return (len(whole), whole.shape[1:].numel()) if whole.ndim > 1 else None
    if up is None or down is None or up.ndim < 2 or down.ndim < 2:
        return None
    return len(up), down.shape[1:].numel()


def _verdicts(found: Inspection, own_names: bool) -> dict[str, Verdict]:
    """Program -> what it does with the file, by the table of docs/exports.md. `own_names`: modules as we name them."""
    programs = (*PROGRAMS, LYCORIS)
    if "not-finite" in found.faults:
        nan = len(found.faults["not-finite"].modules)
        return {ui: (state, why.format(n=nan)) for ui, (state, why) in EFFECTS["not-finite"].items()}
    if "all-zero" in found.by_name:
        return dict(EFFECTS["all-zero"])
    if found.problems:
        return dict.fromkeys(programs, FAULTY)
    if not own_names:
        return dict.fromkeys(programs, OTHER_NAMES)
    readers, form = FAMILIES[found.family].naming.known_readers, found.native.lower()
    told = {program: readers.verdict(form, program) for program in programs}
    if form == "dora" and BASE_HASH not in found.metadata:
        drops = {"diffusers"}  # whichever rule the trainer has
        told = {
            ui: one if ui in drops or one in (UNKNOWN,) or one[0] == "refused" else TWO_RULES
            for ui, one in told.items()
        }
    return told
