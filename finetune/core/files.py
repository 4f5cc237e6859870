"""Reads, hashes and writes files. If a write is interrupted, the old file or the new file remains, never a part."""

from __future__ import annotations

import errno
import glob
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

NO_FOLLOW, BINARY = (
    getattr(os, "O_NOFOLLOW", 0),
    getattr(os, "O_BINARY", 0),
)  # O_NOFOLLOW is POSIX only, O_BINARY Windows only
DAY = 24 * 3600  # seconds


def cache_dir() -> Path:
    """Returns the folder for cached latents, embeddings and class images: $FINETUNE_CACHE, or ~/.cache/finetune."""
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune")


def public_name(source: str) -> str:
    """Returns a name of a base that is safe to share: a hub id unchanged, or only the last part of a path."""
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)
    if is_id and not os.path.exists(source):
        return source
    # PureWindowsPath splits at / and at \
    return PureWindowsPath(source).name.lstrip(".") or Path(source).expanduser().resolve().name


def leads_out(file: Path, folder: Path) -> bool:
    """Returns whether a path inside `folder` leads outside of it through a link (its own, or that of a parent folder).

    In the hub's cache, a snapshot consists of links to the blobs folder beside it. Those count as inside.
    """
    real, root = file.resolve(), folder.resolve()
    if real.is_relative_to(root):
        return False
    model = root.parent.parent  # models--OWNER--NAME/snapshots/REVISION
    hub = root.parent.name == "snapshots" and model.name.startswith("models--")
    return not (hub and real.parent == model / "blobs")


def copy_plain(source: Path, target: Path, folder: Path) -> None:
    """Copies `source`, a file in `folder`, to `target`. The copy gets the permissions of a new file.

    Raises:
        BadInput: `source` is a link that leads out of `folder`, so its content must not be shared.
        OSError: a file can't be read or written.
    """
    if leads_out(source, folder):
        raise BadInput(f"{source} is a link that leads out of {folder}: put the file itself there")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def find_link_out(folder: Path) -> Path | None:
    """Returns the first link at any depth in `folder` that leads out of it, or None."""
    for place, folders, files in os.walk(folder):
        paths = [Path(place) / name for name in sorted([*folders, *files])]
        # on Windows a junction is a folder, not a symbolic link
        odd = [path for path in paths if path.is_symlink() or path.is_dir()]
        link = next((path for path in odd if leads_out(path, folder)), None)
        if link is not None:
            return link
    return None


def _beside(path: Path) -> Path:
    """A temporary path that nobody can guess. `sweep` recognises it by its extension."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def sweep(folder: Path, age: float = 0) -> None:
    """Removes temporary files and folders that a killed process left in `folder`.

    With an `age`, it removes only those that are at least `age` seconds old. Use age 0 only for a folder that no
    other process writes to.
    """
    for left in sorted(folder.rglob(".*.tmp"), reverse=True):
        if left.lstat().st_mtime > time.time() - age and age:
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary file beside `path`. On success it is flushed to the disk and renamed to `path`.

    The file is created here, with the permissions that the umask allows: safetensors would make it readable only by
    its owner. After an error `path` is unchanged and the temporary file is removed.

    Raises:
        FileExistsError: the temporary path already exists.
        OSError: the file can't be written.
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
    """Gives a new temporary folder beside `path`. On success it replaces `path`; after an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """As `replacing_folder`, but a folder that another process makes meanwhile is never replaced.

    What a killed process left of the same folder is removed when it is a day old.

    Raises:
        FileExistsError: `path` is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if left.is_dir() and not left.is_symlink() and left.stat().st_mtime < time.time() - DAY:
            shutil.rmtree(left, ignore_errors=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists() or path.is_symlink():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Appends a line (UTF-8) to a text file, which is created if missing. Raises OSError if `path` is a link."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_FOLLOW | BINARY, 0o666)
    with os.fdopen(descriptor, "ab") as file:
        file.write(f"{line}\n".encode())


def _rename(temporary: Path, path: Path) -> None:
    """Renames to `path`. Windows refuses this while another process reads the old file, so it retries for 1 s."""
    for pause in (0.01, 0.03, 0.1, 0.3, 0.6):
        try:
            temporary.replace(path)
            return
        except PermissionError:
            time.sleep(pause)
    temporary.replace(path)


def flush(path: Path, mode: int | None = None) -> None:
    """Flushes a file, or the entries of a folder, to the disk (fsync). With `mode`, also sets a file's permissions."""
    if path.is_dir():
        if not hasattr(os, "O_DIRECTORY"):  # Windows can't open folders, and journals renames itself
            return
        descriptor = os.open(path, os.O_RDONLY)
    else:
        # Windows can't flush a file that was opened only for reading
        descriptor = os.open(path, os.O_RDWR | (NO_FOLLOW if mode is not None else 0))
    try:
        if mode is not None and hasattr(os, "fchmod"):  # not on Windows
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically, with \\n newlines on every system: equal text gives equal bytes."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically. Tensors and metadata are sorted by name: equal content gives equal bytes.

    The tensors may have any shape and dtype and be on any device.

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
    """Turns safetensors' error for a failed write ("... left on device (os error 28)") into an OSError."""
    said = re.search(r"([^:]*) \(os error (\d+)\)", str(error))
    code, reason = (int(said[2]), said[1].strip()) if said else (errno.EIO, os.strerror(errno.EIO))
    return OSError(
        code, reason, str(path), code
    )  # the last argument is Windows' own error number, which OSError maps to an errno


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata keys, which safetensors writes in random order. The file keeps its length."""
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
    """Returns the tensors of a safetensors file, copied into CPU memory.

    `load_file` would keep them mapped to the file, which Windows then can't replace or remove.

    Raises:
        SafetensorError: it is not a complete safetensors file.
        OSError: it can't be read.
    """
    from safetensors.torch import load_file

    return {name: value.clone() for name, value in load_file(path).items()}


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
