"""Reads the tensors of a checkpoint, which one process wrote whole or several wrote in rows.

Whole: trained.safetensors and the like, with the names of the tensors. In rows: files of torch.distributed.checkpoint
(`finetune.training.shard_files`), with "<part>/<name>" and, in the header, each piece's first row.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.core.reading import parse_json

HEADER, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # as torch.distributed.checkpoint.hf_storage writes them


class Pieces:
    """The tensors in the files of a checkpoint, by "<part>/<name>", whole or in pieces."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder, self.names = folder, list(names)

    @cached_property
    def index(self) -> dict[str, list[tuple[int, list[int], str, str]]]:
        """Key -> its pieces, in order: first row, shape, file, key in the file."""
        found: dict[str, list[tuple[int, list[int], str, str]]] = {}
        for name in self.names:
            with safe_open(self.folder / name, "pt") as held:
                said = (held.metadata() or {}).get(HEADER)
                about = parse_json(said, name, dict) if said else {}
                prefix = "" if said else f"{name.removesuffix('.safetensors')}/"
                for key in held.keys():  # noqa: SIM118 - it is no dict
                    offsets = about.get(key, {}).get(OFFSETS) or [0]
                    shape = held.get_slice(key).get_shape()
                    found.setdefault(f"{prefix}{key}", []).append((offsets[0], shape, name, key))
        return {key: sorted(pieces) for key, pieces in found.items()}

    def mine(self, rank: int) -> list[str]:
        """The keys, without those that are another process's own."""
        return [key for key in self.index if key.partition("@")[2] in ("", str(rank))]

    def size(self, key: str) -> list[int]:
        """The shape of the whole tensor."""
        pieces = self.index[key]
        first, shape, *_ = pieces[-1]
        return [first + shape[0], *shape[1:]] if shape else []

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` (None: to the end) of a tensor."""
        found = []
        for first, shape, name, inside in self.index[key]:
            with safe_open(self.folder / name, "pt") as held:
                if not shape:
                    single: Tensor = held.get_tensor(inside)
                    return single
                last = first + shape[0]
                low, high = max(start, first), last if stop is None else min(stop, last)
                if high > low:
                    found.append(held.get_slice(inside)[low - first : high - first])
                elif not found and (first, shape, name, inside) == self.index[key][-1]:
                    found.append(held.get_tensor(inside)[:0])
        return found[0] if len(found) == 1 else torch.cat(found)
