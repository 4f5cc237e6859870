"""Writing files so that a kill leaves the old one or the new one, never a half; reading and hashing them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def cache_dir() -> Path:
    """Where latents, embeddings and class images are kept: $FINETUNE_CACHE, or ~/.cache/finetune."""
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on success it is flushed to the disk and renamed over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _rename(temporary: Path, path: Path) -> None:
    """Over `path`. Windows refuses that while another process reads the old file: it is tried for about a second."""
    for pause in (0.01, 0.03, 0.1, 0.3, 0.6):
        try:
            temporary.replace(path)
            return
        except PermissionError:
            time.sleep(pause)
    temporary.replace(path)


def flush(path: Path) -> None:
    """Has the kernel write a file, or a folder's list of names, to the disk."""
    if path.is_dir():
        if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders, and keeps a renaming in its journal
            return
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR)  # Windows flushes no file that was opened for reading alone
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """UTF-8 and plain newlines on every system, so that equal text is equal bytes."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file: contiguous CPU tensors, sorted by name, so that equal content is equal bytes.

    Raises:
        OSError: the disk is full, or the folder can't be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata=metadata)
        except SafetensorError as error:
            raise _os_error(error, path) from error
        _sort_metadata(temporary)


def _os_error(error: Exception, path: Path) -> OSError:
    """safetensors' own error for a failed write ("... left on device (os error 28)") as the OSError that it is."""
    said = re.search(r"([^:]*) \(os error (\d+)\)", str(error))
    code, reason = (int(said[2]), said[1].strip()) if said else (errno.EIO, os.strerror(errno.EIO))
    return OSError(code, reason, str(path), code)  # the last one: Windows' own numbers, which it turns into errno's


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in a random order: here its keys are sorted, in the same place and length."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        if not header["__metadata__"]:
            return
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"the header of {path} grew from {size} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(size))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file's tensors, copied into memory.

    `load_file` leaves them mapped to the file, which Windows then neither replaces nor removes.

    Raises:
        SafetensorError: it is no whole safetensors file.
    """
    from safetensors.torch import load_file

    return {name: value.clone() for name, value in load_file(path).items()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
