"""Writing files so that a kill leaves the old one or the new one, never a half; reading and hashing them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from finetune.core.errors import BadInput

if TYPE_CHECKING:
    import torch

NO_FOLLOW, BINARY = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_BINARY", 0)  # the one is POSIX', the other Windows'


def cache_dir() -> Path:
    """Where latents, embeddings and class images are kept: $FINETUNE_CACHE, or ~/.cache/finetune."""
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune")


def public_name(source: str) -> str:
    """A base as it may be told to others: a hub id as it is, of a path the last name alone."""
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)
    if is_id and not os.path.exists(source):
        return source
    return PureWindowsPath(source).name.lstrip(".") or Path(source).expanduser().resolve().name  # Windows' reads both


def leads_out(file: Path, folder: Path) -> bool:
    """Whether a file that `folder` lists lies elsewhere, by a link of its own or of a folder on the way.

    A snapshot of the hub's cache is made of links to the blobs beside it: those count as inside.
    """
    real, root = file.resolve(), folder.resolve()
    if real.is_relative_to(root):
        return False
    model = root.parent.parent  # models--OWNER--NAME/snapshots/REVISION
    hub = root.parent.name == "snapshots" and model.name.startswith("models--")
    return not (hub and real.parent == model / "blobs")


def copy_plain(source: Path, target: Path, folder: Path) -> None:
    """Copies one of `folder`'s files with the rights of a new file.

    Raises:
        BadInput: it is a link that leads out of the folder: its content is not the folder's to pass on.
    """
    if leads_out(source, folder):
        raise BadInput(f"{source} is a link that leads out of {folder}: put the file itself there")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def find_link_out(folder: Path) -> Path | None:
    """The first link in a folder, or in one inside it, that leads out of it."""
    for place, folders, files in os.walk(folder):
        paths = [Path(place) / name for name in sorted([*folders, *files])]
        # a junction of Windows is a folder that is no symbolic link
        odd = [path for path in paths if path.is_symlink() or path.is_dir()]
        link = next((path for path in odd if leads_out(path, folder)), None)
        if link is not None:
            return link
    return None


def _beside(path: Path) -> Path:
    """A temporary path that nobody can guess. Its ending is what `sweep` goes by."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def sweep(folder: Path, age: float = 0) -> None:
    """Removes temporary files and folders that a killed process left in a folder that is ours alone, or that nobody
    has touched for `age` seconds."""
    for left in sorted(folder.rglob(".*.tmp"), reverse=True):
        if left.lstat().st_mtime > time.time() - age and age:
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on success it is flushed to the disk and renamed over `path`.

    The file is made here, where nothing was, with the rights that the umask leaves: safetensors would make it the
    owner's alone.

    Raises:
        FileExistsError: somebody laid something in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666)
    mode = os.fstat(descriptor).st_mode & 0o777
    os.close(descriptor)
    try:
        yield temporary
        flush(temporary, mode)
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`; on success it takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Adds a line to a text file, which is no link."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_FOLLOW | BINARY, 0o666)
    with os.fdopen(descriptor, "ab") as file:
        file.write(f"{line}\n".encode())


def _rename(temporary: Path, path: Path) -> None:
    """Over `path`. Windows refuses that while another process reads the old file: it is tried for about a second."""
    for pause in (0.01, 0.03, 0.1, 0.3, 0.6):
        try:
            temporary.replace(path)
            return
        except PermissionError:
            time.sleep(pause)
    temporary.replace(path)


def flush(path: Path, mode: int | None = None) -> None:
    """Has the kernel write a file, or a folder's list of names, to the disk; a file gets the rights `mode`."""
    if path.is_dir():
        if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders, and keeps a renaming in its journal
            return
        descriptor = os.open(path, os.O_RDONLY)
    else:
        # Windows flushes no file that was opened for reading alone
        descriptor = os.open(path, os.O_RDWR | (NO_FOLLOW if mode is not None else 0))
    try:
        if mode is not None and hasattr(os, "fchmod"):  # not on Windows
            os.fchmod(descriptor, mode)
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
