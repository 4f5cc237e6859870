"""Export formats by name (LoRA files, whole models, embeddings), and which of them can hold a training result."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from finetune.core.errors import BadInput
from finetune.core.registry import Registry
from finetune.export.base import AdapterExport, EmbeddingExport, Export, ModelExport, NativeExport

EXPORTS: Registry[Export] = Registry(Export, "finetune.export", lambda item: item.name, nested=True)

CALLED = {
    "adapter": "an adapter",
    "native": "an adapter in its own form",
    "weights": "whole weights",
    "embedding": "new embeddings",
}


def adapter_exports(names: Sequence[str]) -> list[AdapterExport]:
    """The LoRA formats among `names`, in the same order."""
    return _of_kind(names, AdapterExport)


def native_exports(names: Sequence[str]) -> list[NativeExport]:
    """The formats of other kinds of adapters among `names`."""
    return _of_kind(names, NativeExport)


def model_exports(names: Sequence[str]) -> list[ModelExport]:
    """The formats of whole models among `names`."""
    return _of_kind(names, ModelExport)


def embedding_exports(names: Sequence[str]) -> list[EmbeddingExport]:
    """The embedding formats among `names`."""
    return _of_kind(names, EmbeddingExport)


def _of_kind(names: Sequence[str], kind: Any) -> list[Any]:
    return [export for export in (EXPORTS[name]() for name in names) if isinstance(export, kind)]


def artifact_of(name: str) -> str:
    """The kind of training result that a format holds; "" for an unknown format, such as one of a removed package."""
    return EXPORTS[name].artifact if name in EXPORTS else ""


def formats_for(artifacts: Sequence[str], usual: bool = False) -> list[str]:
    """Every format that can hold these training results (`Method.artifacts`); with `usual`, only the default ones."""
    return [name for what in artifacts for name in _formats(what, usual)]


def _formats(artifact: str, usual: bool) -> list[str]:
    """The usual formats first. Whole weights can also be exported as a LoRA (by singular values), on request."""
    own = sorted((name for name, item in EXPORTS.items() if item.artifact == artifact), key=_comes_later)
    if usual:
        return [name for name in own if EXPORTS[name].usual]
    return own + (_formats("adapter", usual) if artifact == "weights" else [])


def _comes_later(name: str) -> bool:
    return not EXPORTS[name].usual


def check_formats(formats: Sequence[str], artifacts: Sequence[str] = ("adapter",)) -> None:
    """Checks that each format exists and can hold the training results (`Method.artifacts`).

    Raises:
        BadInput: one does not.
    """
    known = formats_for(artifacts)
    for wanted in formats:
        if wanted in known:
            continue
        if wanted in EXPORTS:
            what = " or ".join(CALLED[item] for item in artifacts if item != "native")
            article = "an" if wanted[0] in "aeiou" else "a"
            lacks = f"can't hold {what}, which this run trains"
            if EXPORTS[wanted].holds:
                lacks = f"holds {EXPORTS[wanted].holds}, which this run does not train"
            raise BadInput(f"{article} {wanted} file {lacks}: use {' or '.join(known)}")
        nearest = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
        raise BadInput(f"there is no export format {wanted!r}; {hint}")
