"""Checks a LoRA file against a base: its format, its problems, and how well each UI reads it.

The rules for the UIs come from the source code of their loaders (docs/exports.md). diffusers loads the file itself.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.core.errors import BadInput
from finetune.export.base import Adapter
from finetune.export.lora.diffusers import prefixes, read_header
from finetune.export.lora.kohya import ALPHA, Place, key_of, keys_of, places, split
from finetune.export.lora.peft import Peft
from finetune.families.naming.clip import strip_text_model
from finetune.families.registry import FAMILIES, denoiser_config, family_of, weight_shapes
from finetune.families.source import resolve_base

# ending of a tensor's name -> the tensor's role in a LoRA
ENDINGS = {
    ".lora_down.weight": "a", ".lora_up.weight": "b", ".lora_A.weight": "a", ".lora_B.weight": "b", ALPHA: "alpha",
}  # fmt: skip
OTHERS = {
    ".dora_scale": "DoRA", ".lora_magnitude_vector": "DoRA", ".hada_w1_a": "LoHa", ".hada_w1_b": "LoHa",
    ".hada_w2_a": "LoHa", ".hada_w2_b": "LoHa", ".lokr_w1": "LoKr", ".lokr_w2": "LoKr", ".lokr_w1_a": "LoKr",
    ".lokr_w1_b": "LoKr", ".lokr_w2_a": "LoKr", ".lokr_w2_b": "LoKr", ".oft_blocks": "OFT", ".oft_diag": "OFT",
    ".lora_mid.weight": "LoCon with a middle matrix", ".diff": "full differences", ".diff_b": "full differences",
}  # fmt: skip
LONE_ENCODER, MISNAMED_ENCODER = "lora_te", "lora_te1"  # kohya's names for the only text encoder of SD1, SD2
NO_ALPHA = "no-alpha"
FAULTS = {
    NO_ALPHA: "modules without alpha: readers use the rank as alpha, but the trainer may have used another value",
    "not-finite": "modules with NaN or infinite values",
    "one-matrix": "modules without their {} matrix: readers skip them",
    "another-shape": "modules with another shape than in the base: the adapter was trained on another base",
    "other-method": "keys of {}, which a reader of plain LoRA drops or misreads",
}
FORGE_LIMIT = 12  # with more unmatched keys, Forge ignores the whole file
NOT_KOHYA = (
    ("partly", "it matches only some of these keys (measured on SDXL: 24 of 56): convert it to kohya"),
    ("refused", "it does not read these keys: convert it to kohya"),
    ("unknown", "not established for these keys: convert it to kohya"),
    ("unknown", "not established for these keys: convert it to kohya"),
)


@dataclass(frozen=True)
class Problem:
    """One kind of problem in a file.

    `name`: a stable word for programs. `message`: a description for people. `modules`: the modules or keys concerned;
    empty if the problem concerns the whole file.
    """

    name: str
    message: str
    modules: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The message, with the number of modules and the name of the first."""
        such = f" ({len(self.modules)}, such as {self.modules[0]})" if self.modules else ""
        return f"{self.message}{such}"


@dataclass
class Inspection:
    """The result of an inspection.

    `dtypes`: precisions of the matrices, such as "fp16". `size`: bytes. `ranks`, `scales`: value -> number of modules.
    `zero`: modules whose delta is zero. `faults`: kind of problem -> the problem. `verdicts`: UI -> ("fully",
    "partly", "refused" or "unknown"; the reason).
    """

    path: Path
    kind: str
    family: str
    dtypes: tuple[str, ...]
    size: int
    adapter: Adapter | None
    ranks: Counter[int]
    scales: Counter[float]
    metadata: dict[str, str]
    zero: list[str] = field(default_factory=list)
    unknown_keys: list[str] = field(default_factory=list)
    faults: dict[str, Problem] = field(default_factory=dict)
    verdicts: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def problems(self) -> list[Problem]:
        """All problems, one for each kind."""
        found = list(self.faults.values())
        if self.unknown_keys:
            found.append(Problem("unknown-keys", f"keys that fit nothing in {self.family}", tuple(self.unknown_keys)))
        if self.adapter is None:
            found.append(Problem("nothing-fits", f"the file has no readable module for {self.family}"))
        elif self.zero and len(self.zero) == self.adapter.count:
            found.append(Problem("all-zero", "every module is zero: the adapter changes nothing"))
        return found

    def fault(self, name: str, module: str, of: str = "") -> None:
        """Records that `module` has the problem `name` (a key of FAULTS). `of` fills the blank in its message."""
        known = self.faults.get(name + of)
        modules = known.modules if known else ()
        self.faults[name + of] = Problem(name, FAULTS[name].format(of), (*modules, module))


def inspect_adapter(path: Path, base: str) -> Inspection:
    """Checks a kohya or diffusers file, or a PEFT folder, against a base.

    Raises:
        BadInput: the file does not exist, is not a complete safetensors file, or is not a LoRA.
    """
    folder = resolve_base(base)
    family = family_of(folder).name
    if path.is_dir():
        return _peft_folder(path, family, folder)
    if not path.is_file():
        raise BadInput(f"there is no file {path}: give a .safetensors file or a PEFT folder")
    if path.suffix != ".safetensors":
        raise BadInput(f"{path} is not a .safetensors file: other kinds are refused because they can run code")
    keys = keys_of(path)
    if not any(key.endswith((*ENDINGS, *OTHERS)) for key in keys):
        raise BadInput(
            f"{path} is not a LoRA: none of its {len(keys)} keys (such as {', '.join(keys[:1])}) belongs to one: "
            "give a LoRA file"
        )
    odd = next((key for key in keys if not key.isprintable()), None)
    if odd is not None:  # control characters could change the terminal that prints the key
        raise BadInput(f"{path} has the unprintable key {odd[:80]!r}, which no trainer writes: give another file")
    with safe_open(path, "pt") as opened:
        metadata = dict(opened.metadata() or {})
        tensors = {key: opened.get_tensor(key).clone() for key in keys}  # a copy: the file may be replaced later
    return _inspect(path, tensors, metadata, family, folder)


def open_adapter(path: Path, base: str) -> tuple[Adapter, Inspection]:
    """Reads an adapter from a file, and refuses if any of it would be lost. Returns it with the inspection.

    Raises:
        BadInput: some keys or modules can't be read; the message names them.
    """
    found = inspect_adapter(path, base)
    grave = [problem.line for problem in found.problems if problem.name != NO_ALPHA]
    if found.adapter is None or grave:
        raise BadInput(
            f"{path} can't be read without loss: {'; '.join(grave)}: see `finetune verify {path} --base {base}`"
        )
    return found.adapter, found


def accepted_names(folder: Path) -> dict[str, Place]:
    """Every module name that trainers write for this base -> the modules that it stands for."""
    family = family_of(folder)
    title, prefix, config = family.name, prefixes(family.name), denoiser_config(folder)
    names: dict[str, Place] = {}
    for (part, name), place in places(folder).items():
        names[key_of(title, part, name)] = place
        if part == "denoiser":
            names |= dict.fromkeys(family.naming.other_names(name, config), place)
        elif family.naming.prefixes[part] == LONE_ENCODER:
            names[key_of(title, part, name).replace(f"{LONE_ENCODER}_", f"{MISNAMED_ENCODER}_", 1)] = place
    for part, modules in weight_shapes(folder).items():
        names |= {f"{prefix[part]}.{path}": Place(part, (path,), (shape[0],)) for path, shape in modules.items()}
    return names


def _inspect(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], family: str, folder: Path
) -> Inspection:
    names = accepted_names(folder)
    modules, others, odd = _by_module(tensors)
    known = {name: names[_plain(name)] for name in modules if _plain(name) in names}
    found = Inspection(
        path=path,
        kind=_kind(modules),
        family=family,
        dtypes=tuple(sorted({_dtype(value) for key, value in tensors.items() if not key.endswith(ALPHA)})),
        size=path.stat().st_size,
        adapter=None,
        ranks=Counter(),
        scales=Counter(),
        metadata=metadata,
        unknown_keys=sorted(odd) + sorted(name for name in modules if name not in known),
    )
    weights = weight_shapes(folder)
    layers: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    header_alpha = _header_alpha(found.path, metadata)
    for name in sorted(known):
        place = known[name]
        first = weights[place.part][place.modules[0]]
        pair = _module(found, name, modules[name], header_alpha, torch.Size([sum(place.rows), *first[1:]]))
        if pair is not None:
            apart = split(*pair, place)
            found.ranks.update(len(a) for a, _ in apart.values())
            layers.setdefault(place.part, {}).update(apart)
    for key, what in others.items():
        found.fault("other-method", key, of=what)
    if layers:
        found.adapter = Adapter(family, folder, layers, 1.0)
    found.verdicts = _verdicts(found, list(modules))
    return found


def _by_module(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, str], list[str]]:
    """Module name -> its matrices by role; the keys of other methods; the unknown keys."""
    modules: dict[str, dict[str, Tensor]] = {}
    others: dict[str, str] = {}
    odd = []
    for key, value in tensors.items():
        ending = next((ending for ending in (*ENDINGS, *OTHERS) if key.endswith(ending)), None)
        if ending is None:
            odd.append(key)
        elif ending in OTHERS:
            others[key] = OTHERS[ending]
        else:
            modules.setdefault(key.removesuffix(ending), {})[ENDINGS[ending]] = value
    return {name: held for name, held in modules.items() if held.keys() & {"a", "b"}}, others, odd


def _plain(name: str) -> str:
    """A diffusers name without the wrapper that some encoders have."""
    prefix, dot, rest = name.partition(".")
    return f"{prefix}.{strip_text_model(rest)}" if dot else name


def _module(
    found: Inspection, name: str, held: dict[str, Tensor], header_alpha: float | None, weight: torch.Size
) -> tuple[Tensor, Tensor] | None:
    """(A, B) with the scale in B. None if they can't be used; the reason is recorded in `found`."""
    missing = [role for role in ("a", "b") if role not in held]
    if missing:
        found.fault("one-matrix", name, of="down" if missing == ["a"] else "up")
        return None
    a, b = held["a"].float(), held["b"].float()
    if a.ndim < 2 or b.ndim < 2 or not len(a) or held.get("alpha", a[0, :1].flatten()[:1]).numel() != 1:
        found.fault("another-shape", name)
        return None
    if len(a) != b.shape[1] or len(b) != weight[0] or a[0].numel() != weight[1:].numel():
        found.fault("another-shape", name)
        return None
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        found.fault("not-finite", name)
        return None
    alpha = float(held["alpha"]) if "alpha" in held else header_alpha
    if alpha is not None and not math.isfinite(alpha):
        found.fault("not-finite", name)
        return None
    if alpha is None and FAMILIES[found.family].naming.scale_in_matrices:
        alpha = float(len(a))  # such files carry their scale in the matrices
    if alpha is None:
        found.fault(NO_ALPHA, name)
        alpha = float(len(a))
    if not bool(b.any()) or not bool(a.any()):
        found.zero.append(name)
    found.scales[round(alpha / len(a), 6)] += 1
    return a.reshape(len(a), *weight[1:]), (b * (alpha / len(a))).reshape(*b.shape[:2], *([1] * (len(weight) - 2)))


def _header_alpha(path: Path, metadata: dict[str, str]) -> float | None:
    """The alpha in the header of a diffusers file, if all parts have the same; otherwise None."""
    about = read_header(path, metadata)
    alphas = {
        float(value) for key, value in about.items() if key.endswith(".lora_alpha") and type(value) in (int, float)
    }
    return alphas.pop() if len(alphas) == 1 else None


def _kind(modules: dict[str, Any]) -> str:
    dotted = sum("." in name for name in modules)
    if dotted and dotted < len(modules):
        return "a mixture of two formats"
    return "diffusers" if dotted else "kohya"


def _dtype(value: Tensor) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(value.dtype, str(value.dtype))


def _verdicts(found: Inspection, modules: list[str]) -> dict[str, tuple[str, str]]:
    """How well each UI's loader reads the keys."""
    uis = ("ComfyUI", "Forge/A1111", "InvokeAI", "sdnext")
    if found.adapter is None:
        return dict.fromkeys(uis, ("refused", "nothing fits"))
    naming = FAMILIES[found.family].naming
    if naming.readers is None:
        return dict.fromkeys(uis, ("unknown", f"not established for {found.family}"))
    if naming.joined:
        return _transformer_verdicts(found, uis)
    if found.kind != "kohya":
        return dict(zip(uis, NOT_KOHYA, strict=True))
    lost = len(found.unknown_keys)
    if lost:
        verdicts = dict.fromkeys(uis, ("partly", f"{lost} keys are not loaded"))
        if lost > FORGE_LIMIT:
            verdicts["Forge/A1111"] = ("refused", f"{lost} keys are unmatched, more than {FORGE_LIMIT}")
        for ui in naming.readers.refuse_unknown:
            verdicts[ui] = ("refused", f"unknown keys are an error for {naming.labels.sidecar}")
        return verdicts
    verdicts = dict.fromkeys(uis, ("fully", ""))
    lone = LONE_ENCODER in naming.prefixes.values()
    silent = sum(name.startswith(f"{MISNAMED_ENCODER}_") for name in modules) if lone else 0
    if silent:
        wrong, right = f"{MISNAMED_ENCODER}_", f"{LONE_ENCODER}_"
        why = f"it silently skips {silent} text-encoder modules ({wrong} instead of {right}): convert the file"
        verdicts["InvokeAI"] = verdicts["sdnext"] = ("partly", why)
    return verdicts


def _transformer_verdicts(found: Inspection, uis: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """SD3 and Flux: each UI has its own rules for each form."""
    lost, texts = (
        len(found.unknown_keys),
        len((found.adapter.layers.keys() if found.adapter else set()) - {"denoiser"}),
    )
    if lost:
        return dict.fromkeys(uis, ("partly", f"{lost} keys are not loaded"))
    forms = ("diffusers_format", "with_texts") if found.kind == "diffusers" else ("kohya", "kohya_with_texts")
    readers = FAMILIES[found.family].naming.known_readers
    return {ui: readers.verdict(forms[bool(texts)], ui.split("/")[0]) for ui in uis}


def _peft_folder(path: Path, family: str, folder: Path) -> Inspection:
    if not any(path.glob("*/adapter_config.json")):
        raise BadInput(f"{path} is not a PEFT folder (it has no PART/adapter_config.json): give a LoRA file")
    adapter = Peft().read(path, family, folder)
    files = sorted(path.glob("*/adapter_model.safetensors"))
    with safe_open(files[0], "pt") as opened:
        dtype = _dtype(opened.get_tensor(next(iter(opened.keys()))))
    ranks = Counter(len(a) for _, _, a, _ in adapter.modules())
    found = Inspection(
        path=path,
        kind="peft",
        family=family,
        dtypes=(dtype,),
        size=sum(file.stat().st_size for file in files),
        adapter=adapter,
        ranks=ranks,
        scales=Counter({round(adapter.scale, 6): adapter.count}),
        metadata={},
    )
    table = {(place.part, module) for place in places(folder).values() for module in place.modules}
    found.unknown_keys = [
        f"{part}.{module}" for part, module, _, _ in adapter.modules() if (part, module) not in table
    ]
    shapes = weight_shapes(folder)
    for part, module, a, b in adapter.modules():
        weight = shapes.get(part, {}).get(module)
        if weight is not None and (len(b) != weight[0] or a[0].numel() != weight[1:].numel()):
            found.fault("another-shape", f"{part}.{module}")
        if not bool(a.isfinite().all() and b.isfinite().all()):
            found.fault("not-finite", f"{part}.{module}")
    refused = ("refused", "it reads single files: convert it to kohya")
    found.verdicts = dict.fromkeys(("ComfyUI", "Forge/A1111", "InvokeAI", "sdnext"), refused)
    return found
