"""Formats by name: of LoRA files, whole models and embeddings; and which of them hold what a method leaves."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from finetune.core.errors import BadInput
from finetune.core.registry import Registry
from finetune.export.base import AdapterExport, EmbeddingExport, Export, ModelExport

EXPORTS: Registry[Export] = Registry(Export, "finetune.export", lambda item: item.name, nested=True)

CALLED = {"adapter": "an adapter", "weights": "whole weights", "embedding": "new embeddings"}


def adapter_exports(names: Sequence[str]) -> list[AdapterExport]:
    """Those of these formats that are of LoRA files, in the same order."""
    return _of_kind(names, AdapterExport)


def model_exports(names: Sequence[str]) -> list[ModelExport]:
    """Those that are of whole models."""
    return _of_kind(names, ModelExport)


def embedding_exports(names: Sequence[str]) -> list[EmbeddingExport]:
    """Those that are of new embeddings."""
    return _of_kind(names, EmbeddingExport)


def _of_kind(names: Sequence[str], kind: Any) -> list[Any]:
    return [export for export in (EXPORTS[name]() for name in names) if isinstance(export, kind)]


def artifact_of(name: str) -> str:
    """What a format holds; empty for one that is not known here, as of a package that is gone."""
    return EXPORTS[name].artifact if name in EXPORTS else ""


def formats_for(artifacts: Sequence[str], usual: bool = False) -> list[str]:
    """Every format that holds what a method leaves (`Method.artifacts`); the `usual` ones, where none is asked for."""
    return [name for what in artifacts for name in _formats(what, usual)]


def _formats(artifact: str, usual: bool) -> list[str]:
    """The usual ones first. Whole weights also leave as a LoRA, by singular values, where that is asked for."""
    own = sorted((name for name, item in EXPORTS.items() if item.artifact == artifact), key=_comes_later)
    if usual:
        return [name for name in own if EXPORTS[name].usual]
    return own + (_formats("adapter", usual) if artifact == "weights" else [])


def _comes_later(name: str) -> bool:
    return not EXPORTS[name].usual


def check_formats(formats: Sequence[str], artifacts: Sequence[str] = ("adapter",)) -> None:
    """Raises BadInput for a format that does not exist, or can't hold what is trained (`Method.artifacts`)."""
    known = formats_for(artifacts)
    for wanted in formats:
        if wanted in known:
            continue
        if wanted in EXPORTS:
            what = " or ".join(CALLED[item] for item in artifacts)
            article = "an" if wanted[0] in "aeiou" else "a"
            raise BadInput(
                f"{article} {wanted} file can't hold {what}, which this run trains: use {' or '.join(known)}"
            )
        nearest = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
        raise BadInput(f"there is no export format {wanted!r}; {hint}")
