"""LoRA formats by name, and which formats hold what a method leaves."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from finetune.core.errors import BadInput
from finetune.core.registry import Registry
from finetune.export.base import Export
from finetune.export.embedding import NAME as EMBEDDING

EXPORTS: Registry[Export] = Registry(Export, "finetune.export.lora", lambda item: item.name)


FOLDER, CHECKPOINT = "folder", "checkpoint"  # whole models


# what a method leaves (`Method.leaves`) -> the formats that hold it, and what it is called
def _formats(usual: bool) -> dict[str, tuple[str, ...]]:
    whole = (FOLDER,) if usual else (FOLDER, CHECKPOINT, *EXPORTS)
    return {"adapter": tuple(EXPORTS), "weights": whole, "embedding": (EMBEDDING,)}


CALLED = {"adapter": "an adapter", "weights": "whole weights", "embedding": "new embeddings"}


def formats_for(artifacts: Sequence[str], usual: bool = False) -> list[str]:
    """Every format that holds what a method's `leaves` names; the `usual` ones, where nothing is asked for."""
    return [name for what in artifacts for name in _formats(usual)[what]]


def check_formats(formats: Sequence[str], artifacts: Sequence[str] = ("adapter",)) -> None:
    """Raises BadInput for a format that does not exist, or can't hold what is trained (`Method.leaves`)."""
    known = formats_for(artifacts)
    for wanted in formats:
        if wanted in known:
            continue
        if wanted in formats_for(tuple(CALLED)):
            what = " or ".join(CALLED[item] for item in artifacts)
            article = "an" if wanted == EMBEDDING else "a"
            raise BadInput(
                f"{article} {wanted} file can't hold {what}, which this run trains: use {' or '.join(known)}"
            )
        nearest = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
        raise BadInput(f"there is no export format {wanted!r}; {hint}")
