"""Small entries on disk, each a safetensors file: named by a hash of what it was made from, and checked by its
content."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.core.files import load_tensors, save_tensors

SOURCE, CONTENT = "made_from", "sha256"  # in the header of an entry


def _file(folder: Path, source: str) -> Path:
    name = hashlib.sha256(source.encode()).hexdigest()
    return folder / name[:2] / f"{name}.safetensors"


def save_entry(folder: Path, source: str, tensors: dict[str, Tensor]) -> None:
    """Writes an entry that says what it was made from, and a hash of its tensors."""
    told = {SOURCE: hashlib.sha256(source.encode()).hexdigest(), CONTENT: _content(tensors)}
    save_tensors(_file(folder, source), tensors, told)


def load_entry(folder: Path, source: str) -> dict[str, Tensor] | None:
    """An entry's tensors. None, so that it is made again, where there is none; where it is damaged, down to one bit;
    and where it was made from something else, as a file under another's name is."""
    file = _file(folder, source)
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            told = opened.metadata() or {}
        tensors = load_tensors(file)
    except (SafetensorError, OSError):
        return None
    if told.get(SOURCE) != file.stem or told.get(CONTENT) != _content(tensors):
        return None
    return tensors


def _content(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}:".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
