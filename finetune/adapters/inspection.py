"""Checks a LoRA file against a base: its format, its problems, and how well each UI reads it.

The rules for the UIs come from the source code of their loaders (docs/exports.md). diffusers loads the file itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from finetune.adapters.bases import accepted_names, chosen_base, weight_of
from finetune.adapters.checks import another_base, header_family, mixed_names, odd_alphas
from finetune.adapters.exact_forms import inspect_native, native_of
from finetune.adapters.faults import BEARABLE, HEADER_ALPHA, HEADER_RANK, NO_ALPHA, OTHER_METHOD
from finetune.adapters.header import HeaderScales
from finetune.adapters.keys import OLD_DIFFUSERS, Modules, by_module, is_lora, without_wrapper
from finetune.adapters.pairs import Faulty, pair_of, with_scale
from finetune.adapters.peft_folder import inspect_folder
from finetune.adapters.result import Inspection, dtype_name
from finetune.core.errors import BadInput
from finetune.export.base import Adapter
from finetune.export.lora.kohya import ALPHA, Pair, Place, keys_of, split
from finetune.families.registry import FAMILIES, weight_shapes

EMBEDDINGS = {"emb_params", "clip_l", "clip_g", "t5xxl"}  # the keys of embedding files

__all__ = ["accepted_names", "inspect_adapter", "open_adapter"]


def inspect_adapter(path: Path, base: str | None = None) -> Inspection:
    """Checks a kohya or diffusers file, or a PEFT folder, against a base; without one, against the base that the
    file's header, names and sizes tell.

    Raises:
        BadInput: the file does not exist, is not a complete safetensors file, is not a LoRA, or does not tell for
            which base it is.
    """
    if path.is_dir():
        return inspect_folder(path, base)
    if not path.is_file():
        raise BadInput(f"there is no file or folder {path}: give a .safetensors file or a PEFT folder")
    if path.suffix != ".safetensors":
        raise BadInput(f"{path} is not a .safetensors file: other kinds are refused because they can run code")
    keys = keys_of(path)
    widths = embedding_widths(path, keys)
    if widths:
        raise BadInput(f"{path} is an embedding (textual inversion) of {widths}: give a LoRA file")
    if not is_lora(keys):
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
    native = native_of(tensors)
    return inspect_native(path, native, tensors, metadata, base) if native else _inspect(path, tensors, metadata, base)


def embedding_widths(path: Path, keys: Sequence[str]) -> str:
    """The tensors of a file of embeddings, with their sizes, as text; "" for other files."""
    if not keys or not set(keys) <= EMBEDDINGS:
        return ""
    with safe_open(path, "pt") as opened:
        shapes = {key: opened.get_slice(key).get_shape() for key in sorted(keys)}
    return ", ".join(
        f"{key} ({' x '.join(map(str, shape[:-1]))} vectors of width {shape[-1]})"
        if len(shape) > 1
        else f"{key} {shape}"
        for key, shape in shapes.items()
    ).replace("(1 vectors", "(1 vector")


def open_adapter(path: Path, base: str | None = None) -> tuple[Adapter, Inspection]:
    """Reads an adapter from a file, and refuses if any of it would be lost. Returns it with the inspection.

    Raises:
        BadInput: some keys or modules can't be read; the message names them.
    """
    found = inspect_adapter(path, base)
    if found.native:
        raise BadInput(
            f"{path} is {found.called}, and not a plain LoRA: export its run with --to kohya, and give that"
        )
    grave = [problem.line for problem in found.problems if problem.name not in BEARABLE]
    if found.adapter is None or grave:
        named = f" --base {base}" if base else ""
        raise BadInput(f"{path} can't be read without loss: {'; '.join(grave)}: see `finetune verify FILE{named}`")
    return found.adapter, found


def _inspect(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], base: str | None) -> Inspection:
    modules = by_module(tensors)
    shapes = {name: {role: value.shape for role, value in held.items()} for name, held in modules.held.items()}
    compared = chosen_base(path, shapes, metadata, base)
    family, names = compared.family, accepted_names(compared.folder)
    known = {name: names[without_wrapper(name)] for name in modules.held if without_wrapper(name) in names}
    found = Inspection(
        path=path,
        kind=modules.kind,
        compared=compared,
        family=family,
        dtypes=tuple(sorted({dtype_name(value) for key, value in tensors.items() if not key.endswith(ALPHA)})),
        size=path.stat().st_size,
        metadata=metadata,
        unknown_keys=sorted(modules.odd) + sorted(name for name in modules.held if name not in known),
    )
    for key, what in modules.others.items():
        found.fault(OTHER_METHOD, key, of=what)
    reader = _Reader(found, HeaderScales(path, metadata, family))
    layers = reader.layers(modules, known)
    if layers:
        found.adapter = Adapter(family, compared.folder, layers, 1.0, compared.alike)
    odd_alphas(found, modules.held, known)
    mixed_names(found, known)
    another_base(found, shapes, reader.sizes, reader.read)
    header_family(found)
    if found.kind == OLD_DIFFUSERS:
        found.notes.append("these keys have no alpha: the scripts that wrote them used the rank")
    found.judge(list(modules.held))
    return found


class _Reader:
    """Reads the modules of one file, and records their faults in `found`.

    `sizes`: modules of other sizes than in the base -> (in the file, in the base). `header`: the modules whose scale
    is in the header alone, and is not 1. `read`: the number of modules that could be read.
    """

    def __init__(self, found: Inspection, header: HeaderScales) -> None:
        self.found, self.scales = found, header
        self.sizes: dict[str, tuple[str, str]] = {}
        self.header: list[str] = []
        self.read = 0

    def layers(self, modules: Modules, known: Mapping[str, Place]) -> dict[str, dict[str, Pair]]:
        weights = weight_shapes(self.found.compared.folder)
        layers: dict[str, dict[str, Pair]] = {}
        for name in sorted(known):
            place = known[name]
            try:
                pair = pair_of(modules.held[name], weight_of(place, weights))
                pair = with_scale(pair, self._scale(name, place, modules.held[name], len(pair[0])))
            except Faulty as error:
                self.found.fault(error.fault, name, of=error.of)
                self.sizes |= {name: error.sizes} if error.sizes else {}
                continue
            apart, part = split(*pair, place), layers.setdefault(place.part, {})
            if apart.keys() & part.keys():
                self.found.fault("twice", name)
                continue
            if not bool(pair[0].any()) or not bool(pair[1].any()):
                self.found.zero.append(name)
            self.read += 1
            self.found.ranks.update(len(a) for a, _ in apart.values())
            part.update(apart)
        if self.header and FAMILIES[self.found.family].naming.scale_in_matrices:
            for name in self.header:
                self.found.fault(HEADER_ALPHA, name)
        return {part: held for part, held in layers.items() if held}

    def _scale(self, name: str, place: Place, held: Mapping[str, Tensor], rank: int) -> float:
        """alpha / rank, from the module's own alpha or from the header."""
        scale = float(held["alpha"]) / rank if "alpha" in held else None
        if scale is None:
            scale = self.scales.scale(place.part, place.modules[0], rank)
            said = self.scales.rank(place.part, place.modules[0])
            if said is not None and said != rank:
                self.found.fault(HEADER_RANK, name)
            if scale is not None and abs(scale - 1) > 1e-6:
                self.header.append(name)
        settled = FAMILIES[self.found.family].naming.scale_in_matrices or self.found.kind == OLD_DIFFUSERS
        if scale is None and not settled:
            self.found.fault(NO_ALPHA, name)
        scale = 1.0 if scale is None else scale  # some files carry their scale in the matrices
        self.found.scales[round(scale, 6)] += 1
        return scale
