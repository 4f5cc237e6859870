"""A .zip of photos, as a phone or a cloud drive gives it."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from finetune.core.errors import BadInput
from finetune.data.sources.base import Packed, is_usable

LARGEST = 2**30  # bytes of one file: a photo is far smaller, and memory is not endless


class Zip(Packed):
    """Photos and captions at its top, or in one folder of it."""

    name = "zip"

    @classmethod
    def matches(cls, path: Path) -> bool:
        return path.suffix.lower() == ".zip" and path.is_file()

    def files(self, path: Path) -> Iterator[tuple[str, bytes]]:
        try:
            with zipfile.ZipFile(path) as held:
                entries = [entry for entry in held.infolist() if not entry.is_dir() and not _is_hidden(entry.filename)]
                _refuse_several_folders(path, [entry.filename for entry in entries])
                for entry in entries:
                    yield PurePosixPath(entry.filename).name, _read(held, entry, path)
        except zipfile.BadZipFile as error:
            raise BadInput(f"{path} is no whole zip file ({error}): make or copy it again") from error


def _is_hidden(name: str) -> bool:
    """What macOS adds, and files whose names begin with a dot: a folder's are passed over too."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _refuse_several_folders(path: Path, names: list[str]) -> None:
    folders = sorted({PurePosixPath(name).parent.as_posix() for name in names if is_usable(PurePosixPath(name).name)})
    if len(folders) > 1:
        raise BadInput(f"{path} holds photos in several folders ({', '.join(folders)}): give a zip with one of them")


def _read(held: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> bytes:
    if not is_usable(PurePosixPath(entry.filename).name):
        return b""
    if entry.file_size > LARGEST:
        raise BadInput(f"{entry.filename} in {path} is {entry.file_size:,} bytes: that is no photo, take it out")
    try:
        return held.read(entry)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BadInput(f"{entry.filename} in {path} is damaged ({error}): make or copy the zip again") from error
    except (RuntimeError, NotImplementedError) as error:  # a password, a compression that Python has not
        raise BadInput(
            f"{entry.filename} in {path} can't be read ({error}): make the zip again without that"
        ) from error
