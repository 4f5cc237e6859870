"""Exports. Every module here that defines an `Export` with a `name` is a format: a new one is one new file."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import shutil
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import BadInput
from finetune.export.base import DTYPES, Adapter, Bench, Export, Exported
from finetune.export.checkpoint import export_checkpoint
from finetune.export.embedding import NAME as EMBEDDING
from finetune.export.embedding import export_embedding, read_embedding
from finetune.export.embedding import usage as embedding_usage
from finetune.export.folder import export_folder
from finetune.export.metadata import adapter_metadata
from finetune.export.verify import apply_adapter, verify
from finetune.families.base import Family
from finetune.methods.base import Method
from finetune.methods.lora import LoRA

__all__ = [
    "CHECKPOINT",
    "DTYPES",
    "EMBEDDING",
    "FOLDER",
    "REGISTRY",
    "Adapter",
    "Bench",
    "Exported",
    "adapter_from",
    "adapter_metadata",
    "apply_adapter",
    "check_formats",
    "embedding_usage",
    "export_adapter",
    "export_checkpoint",
    "export_embedding",
    "export_folder",
    "formats_for",
    "read_embedding",
]


def _discover() -> dict[str, Export]:
    found: dict[str, Export] = {}
    for module in pkgutil.iter_modules(__path__):
        for item in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if inspect.isclass(item) and issubclass(item, Export) and not inspect.isabstract(item):
                found[item.name] = item()
    return dict(sorted(found.items()))


REGISTRY: dict[str, Export] = _discover()
FOLDER, CHECKPOINT = "folder", "checkpoint"  # whole models
# what a method leaves (`Method.leaves`) -> the formats that hold it, and what it is called
FORMATS = {"adapter": tuple(REGISTRY), "weights": (FOLDER, CHECKPOINT, *REGISTRY), "embedding": (EMBEDDING,)}
USUAL = {"adapter": tuple(REGISTRY), "weights": (FOLDER,), "embedding": (EMBEDDING,)}
CALLED = {"adapter": "an adapter", "weights": "whole weights", "embedding": "new embeddings"}


def adapter_from(method: Method, family: Family) -> Adapter:
    """The trained LoRA as plain matrices."""
    assert isinstance(method, LoRA), f"{method.kind} has no low-rank matrices"
    state = method.state_dict(family)
    layers: dict[str, dict[str, tuple]] = {}
    for key, a in state.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            part, module = name.split(".", 1)
            layers.setdefault(part, {})[module] = (a.float().cpu(), state[f"{name}.lora_B.weight"].float().cpu())
    divisor = method.rank**0.5 if method.rank_stabilised else method.rank
    return Adapter(family.name, family.folder, layers, method.alpha_value / divisor)


def formats_for(leaves: Sequence[str], usual: bool = False) -> list[str]:
    """Every format that holds what a method's `leaves` names; the `usual` ones, where nothing is asked for."""
    return [name for what in leaves for name in (USUAL if usual else FORMATS)[what]]


def check_formats(formats: Sequence[str], leaves: Sequence[str] = ("adapter",)) -> None:
    """Raises BadInput for a format that does not exist, or can't hold what is trained (`Method.leaves`)."""
    known = formats_for(leaves)
    for wanted in formats:
        if wanted in known:
            continue
        if wanted in formats_for(tuple(FORMATS)):
            what = " or ".join(CALLED[item] for item in leaves)
            article = "an" if wanted == EMBEDDING else "a"
            raise BadInput(
                f"{article} {wanted} file can't hold {what}, which this run trains: use {' or '.join(known)}"
            )
        nearest = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
        raise BadInput(f"there is no export format {wanted!r}; {hint}")


def export_adapter(
    adapter: Adapter,
    folder: Path,
    name: str,
    formats: Sequence[str],
    dtype: str,
    about: dict[str, str],
    bench: Bench,
    v_prediction: bool = False,
    force: bool = False,
) -> list[Exported]:
    """Writes each format, and checks it on `bench`.

    Raises:
        BadInput: an unknown format, or a file that is already there without `force`.
    """
    check_formats(formats)
    exported = []
    written = adapter.balanced() if dtype == "fp16" else adapter
    for wanted in formats:
        export = REGISTRY[wanted]
        path = export.path(folder, name, adapter.family)
        if path.exists() and not force:
            raise BadInput(f"{path} is already there: remove it, or pass --force")
        if path.is_dir():
            shutil.rmtree(path)
        export.write(written, path, DTYPES[dtype], adapter_metadata(adapter, about, v_prediction))
        exported.append(verify(adapter, export, path, DTYPES[dtype], bench))
    return exported
