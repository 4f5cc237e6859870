"""Many entries in few files on disk: shards of up to some thousand entries, which are never changed.

A shard is a safetensors file whose tensors hold its entries in rows, with each entry's key and SHA-256 beside them.
Its name is the SHA-256 of its content, so that damage anywhere is found, processes can write to one folder without
asking each other, and a kill leaves whole shards or none. Entries are read by their place in the file: a memory map
would count as this process's memory, and Windows could not replace or remove the file.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from finetune.core.allocator import give_back_freed_memory
from finetune.core.errors import BadInput
from finetune.core.files import replacing, sha256
from finetune.core.parallel import mapped
from finetune.core.reading import MAX_BYTES, parse_json

MOST_ENTRIES, MOST_BYTES, MOST_SECONDS = 4096, 32_000_000, 60.0  # of a shard: what it holds, what a kill can cost
IN_MEMORY = 64_000_000  # bytes of entries that stay in memory after they were read
KEYS, DIGESTS, SOURCE = "keys", "digests", "made_from"
NARROWED = "fp16."  # before the name of a tensor that was fp32 and is stored as fp16
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

StoredEntry = dict[str, Tensor]


class RowLayout(NamedTuple):
    """Where a tensor lies in a shard: the offset of its first row, and the dtype and shape of one row."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """An open shard. `digests` [n, 32]: of each entry."""

    file: Path
    tensors: Mapping[str, RowLayout]
    digests: np.ndarray

    def read(self, row: int) -> StoredEntry | None:
        """Returns an entry; None where the file is gone or damaged."""
        found, digest = {}, hashlib.sha256()
        try:
            with self.file.open("rb") as opened:
                for name, place in self.tensors.items():
                    opened.seek(place.offset + row * place.size)
                    content = bytearray(opened.read(place.size))
                    digest.update(content)
                    if len(content) != place.size:
                        return None
                    found[name] = torch.frombuffer(content, dtype=place.dtype).reshape(place.shape)
        except OSError:
            return None
        return found if digest.digest() == self.digests[row].tobytes() else None


class _Open:
    """Entries of one form that are not yet on the disk, as rows of one tensor for each name.

    They are copied into it: thousands of small tensors that stay between the freed activations of an encoder would
    hold many times their own size of memory.
    """

    def __init__(self, first: StoredEntry) -> None:
        """`first` has the form of all entries."""
        self.since = time.monotonic()
        self.most = max(1, min(MOST_ENTRIES, -(-MOST_BYTES // max(1, _size(first)))))
        self.rows = {name: torch.empty(self.most, *value.shape, dtype=value.dtype) for name, value in first.items()}
        self.places: dict[bytes, int] = {}

    @property
    def full(self) -> bool:
        return len(self.places) == self.most or time.monotonic() - self.since > MOST_SECONDS

    def add(self, key: bytes, entry: StoredEntry) -> None:
        row = self.places.setdefault(key, len(self.places))
        for name, value in entry.items():
            self.rows[name][row] = value

    def taken(self) -> tuple[list[bytes], StoredEntry]:
        """The keys, in order, and the entries in rows of that order. They are in here no longer, so that two copies of
        one name's rows are in memory at a time."""
        keys = sorted(self.places)
        order = torch.tensor([self.places[key] for key in keys])
        return keys, {name: self.rows.pop(name)[order] for name in list(self.rows)}


class Shards:
    """The entries in one folder that were made from the same thing.

    Args:
        folder: the folder of all such caches; this one is inside of it.
        source: what all entries were made from, besides their keys.
        narrow: store fp32 values as fp16. They come back as fp32.
    """

    def __init__(self, folder: Path, source: str, narrow: bool = False) -> None:
        self.source = hashlib.sha256(f"{source}:{'fp16' if narrow else 'exact'}".encode()).hexdigest()
        self.folder, self.narrow = folder / self.source[:16], narrow
        self._shards: dict[Path, Shard | None] = {}  # None: damaged, or of something else
        self._places: dict[bytes, tuple[Shard, int]] = {}
        self._open: dict[Any, _Open] = {}
        self._recent: OrderedDict[bytes, StoredEntry] = OrderedDict()
        self._size = 0
        self._checked: set[Path] = set()

    def find(self, keys: Iterable[str], workers: int = 1) -> list[str]:
        """Looks for entries on the disk, and checks each shard that has some of them, down to one bit.

        Returns the keys, each once, of entries that are not there and must be made.
        """
        for file in sorted(self.folder.glob("*.safetensors")):
            if file not in self._shards:
                self._add(file, open_shard(file, self.source))
        wanted = {_short(key): key for key in keys}
        used = {self._places[short][0].file for short in wanted if short in self._places} - self._checked
        for file, whole in zip(used, mapped(_is_whole, used, workers), strict=True):
            self._checked.add(file)
            if not whole:
                self._forget(file)
        return [key for short, key in wanted.items() if short not in self._places]

    def warm(self, keys: Iterable[str]) -> None:
        """Reads entries, until no other like the last would stay in memory: a small set needs no disk from then on."""
        for key in keys:
            entry = self.read(key)
            if self._size + _size(entry) > IN_MEMORY:
                return

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Takes an entry. It is on the disk after `flush`, or earlier.

        Raises:
            OSError: a shard can't be written.
        """
        entry = self._stored(tensors)
        form = tuple((name, value.dtype, tuple(value.shape)) for name, value in entry.items())
        held = self._open.get(form) or self._open.setdefault(form, _Open(entry))
        held.add(_short(key), entry)
        if held.full:
            self._write(self._open.pop(form))

    def flush(self) -> None:
        """Writes every entry that is not on the disk yet.

        Raises:
            OSError: a shard can't be written.
        """
        while self._open:
            self._write(self._open.popitem()[1])

    def read(self, key: str) -> StoredEntry:
        """Returns an entry's tensors on the CPU, in the dtypes that they were made in.

        Raises:
            KeyError: there is none.
            BadInput: its file is gone or damaged since `find`.
        """
        short = _short(key)
        if short in self._recent:
            self._recent.move_to_end(short)
            return self._recent[short]
        shard, row = self._places[short]
        found = shard.read(row)
        if found is None:
            self._forget(shard.file)
            raise BadInput(
                f"the cache file {shard.file} was removed or damaged while it was used: start the run again with "
                "`finetune resume RUN`, which makes it anew"
            )
        entry = {name.removeprefix(NARROWED): _widened(name, value) for name, value in found.items()}
        self._recent[short] = entry
        self._size += _size(entry)
        while self._size > IN_MEMORY and len(self._recent) > 1:
            self._size -= _size(self._recent.popitem(last=False)[1])
        return entry

    def _stored(self, tensors: Mapping[str, Tensor]) -> StoredEntry:
        found = {}
        for name in sorted(tensors):
            value = tensors[name].detach().cpu().contiguous()
            small = value.half() if self.narrow and value.dtype == torch.float32 else None
            if small is not None and bool(small.isfinite().all()):
                found[f"{NARROWED}{name}"] = small
            else:
                found[name] = value
        return found

    def _write(self, held: _Open) -> None:
        keys, tensors = held.taken()
        digests = b"".join(_digest({name: rows[row] for name, rows in tensors.items()}) for row in range(len(keys)))
        tensors[KEYS] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(-1, 32)
        tensors[DIGESTS] = torch.frombuffer(bytearray(digests), dtype=torch.uint8).reshape(-1, 32)
        content = save(tensors, {SOURCE: self.source})
        file = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        with replacing(file) as temporary:
            temporary.write_bytes(content)
        self._checked.add(file)
        self._add(file, open_shard(file, self.source))
        del tensors, content
        give_back_freed_memory()  # what made the entries leaves memory behind, as much as they have themselves

    def _add(self, file: Path, found: tuple[Shard, list[bytes]] | None) -> None:
        self._shards[file] = found[0] if found else None
        if found:
            shard, keys = found
            for row, key in enumerate(keys):
                self._places.setdefault(key, (shard, row))

    def _forget(self, file: Path) -> None:
        """Removes a damaged shard, so that its entries are made again."""
        self._shards.pop(file, None)
        self._places = {key: place for key, place in self._places.items() if place[0].file != file}
        try:
            file.unlink(missing_ok=True)
        except OSError:  # it stays, and is found damaged again
            self._shards[file] = None


def open_shard(file: Path, source: str) -> tuple[Shard, list[bytes]] | None:
    """A shard and the keys of its entries, by its header; None where it is damaged or was made from something else."""
    try:
        with file.open("rb") as held:
            size = int.from_bytes(held.read(8), "little")
            header = parse_json(held.read(size).decode(), str(file), dict) if size <= MAX_BYTES else {}
            if header.pop("__metadata__", {}).get(SOURCE) != source:
                return None
            start = 8 + size
            keys = _rows(held, header.pop(KEYS), start)
            digests = _rows(held, header.pop(DIGESTS), start)
        places = {name: _place(header[name], start, len(keys)) for name in sorted(header)}
    except (BadInput, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Shard(file, places, digests), [row.tobytes() for row in keys]


def _rows(held: Any, about: dict[str, Any], start: int) -> np.ndarray:
    """A tensor [n, 32] of bytes."""
    first, last = about["data_offsets"]
    held.seek(start + first)
    return np.frombuffer(held.read(last - first), dtype=np.uint8).reshape(-1, 32)


def _place(about: dict[str, Any], start: int, count: int) -> RowLayout:
    if about["shape"][0] != count:
        raise ValueError("not one row for each key")
    return RowLayout(start + about["data_offsets"][0], DTYPES[about["dtype"]], tuple(about["shape"][1:]))


def _is_whole(file: Path) -> bool:
    try:
        return sha256(file) == file.stem
    except OSError:
        return False


def _digest(entry: StoredEntry) -> bytes:
    """SHA-256 over the values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(entry):
        digest.update(entry[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _short(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _size(entry: StoredEntry) -> int:
    return sum(value.nbytes for value in entry.values())


def _widened(name: str, value: Tensor) -> Tensor:
    return value.float() if name.startswith(NARROWED) else value
