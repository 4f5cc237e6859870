"""A base by its contents: SHA-256 of each file that it is read from, and one over all.

Hashing gigabytes takes long, so a file's hash is kept and taken again while the file's size, both of its times and its
inode stay as they were. `finetune doctor --rehash` forgets all of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from finetune.core.errors import BadInput
from finetune.core.files import cache_dir, sha256, write_json
from finetune.core.reading import read_json

SUFFIXES = (".json", ".txt", ".safetensors", ".bin", ".model")
OLDER = (".json", ".txt", ".safetensors", ".bin")  # of runs before the sentencepiece models of T5 were hashed


def base_files(folder: Path) -> dict[str, str]:
    """File of a base, below its folder -> SHA-256 of its content; of configs, tokenizers and weights."""
    known = _Known()
    found = {}
    for file in _files(folder):
        found[file.relative_to(folder).as_posix()] = known.hash_of(file)
    known.write()
    return found


def file_hashes(files: Iterable[Path]) -> dict[Path, str]:
    """Each file -> SHA-256 of its content."""
    known = _Known()
    found = {file: known.hash_of(file) for file in files}
    known.write()
    return found


def base_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a base's files."""
    return _joined(base_files(folder), SUFFIXES)


def is_base_of(folder: Path, recorded: str) -> bool:
    """Whether `recorded` is this base's hash, now or by the rule of older runs."""
    files = base_files(folder)
    return recorded in (_joined(files, SUFFIXES), _joined(files, OLDER))


def forget_hashes() -> None:
    """Removes all stored hashes, so that every file is hashed again when it is next needed."""
    _kept().unlink(missing_ok=True)


def _joined(files: dict[str, str], suffixes: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name, value in files.items():
        if name.endswith(suffixes):
            digest.update(f"{name}={value}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    """In an order that is the same on every system. Parts may be links to folders, which `rglob` does not enter."""
    found = {file for file in (*folder.rglob("*"), *folder.glob("*/*")) if file.suffix in SUFFIXES and file.is_file()}
    unread = {file for file in found if file.suffix == ".bin" and any(file.parent.glob("*.safetensors"))}
    return sorted(found - unread, key=lambda file: file.parts)  # Windows' own order ignores case


class _Known:
    """Hashes by path and by what changes with a file's content."""

    def __init__(self) -> None:
        self.hashes = self._read()
        self.before = len(self.hashes)

    def hash_of(self, file: Path) -> str:
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
        if key not in self.hashes:
            self.hashes[key] = sha256(file)
        return self.hashes[key]

    def write(self) -> None:
        if len(self.hashes) != self.before:
            write_json(_kept(), self.hashes)

    def _read(self) -> dict[str, str]:
        """Nothing where the file is damaged, since it can be made again."""
        try:
            found = read_json(_kept(), dict) if _kept().is_file() else {}
        except BadInput:
            return {}
        return {key: value for key, value in found.items() if re.fullmatch(r"[0-9a-f]{64}", str(value))}


def _kept() -> Path:
    return cache_dir() / "file-hashes.json"
