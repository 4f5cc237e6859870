"""A .zip file of photos, such as phones and cloud drives create."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from finetune.core.errors import BadInput
from finetune.data.sources.base import Packed, is_usable

LARGEST = 2**30  # bytes of one file: photos are far smaller, and memory is limited


class Zip(Packed):
    """A zip file with photos and captions at the top level or in one folder."""

    name = "zip"

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Returns whether the path is a file whose name ends in .zip."""
        return path.suffix.lower() == ".zip" and path.is_file()

    def files(self, path: Path) -> Iterator[tuple[str, bytes]]:
        """Gives (name, content) of each file; files that are not used have no content.

        Raises:
            BadInput: the zip file is damaged or encrypted, a file is too large, or photos are in several folders.
        """
        try:
            with zipfile.ZipFile(path) as held:
                entries = [entry for entry in held.infolist() if not entry.is_dir() and not _is_hidden(entry.filename)]
                _refuse_several_folders(path, [entry.filename for entry in entries])
                for entry in entries:
                    yield PurePosixPath(entry.filename).name, _read(held, entry, path)
        except zipfile.BadZipFile as error:
            raise BadInput(f"{path} is not a complete zip file ({error}): create or copy it again") from error


def _is_hidden(name: str) -> bool:
    """Whether macOS added the file, or its name begins with a dot. Such files are ignored in folders too."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _refuse_several_folders(path: Path, names: list[str]) -> None:
    folders = sorted({PurePosixPath(name).parent.as_posix() for name in names if is_usable(PurePosixPath(name).name)})
    if len(folders) > 1:
        raise BadInput(f"{path} holds photos in several folders ({', '.join(folders)}): give a zip with one of them")


def _read(held: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> bytes:
    if not is_usable(PurePosixPath(entry.filename).name):
        return b""
    if entry.file_size > LARGEST:
        raise BadInput(f"{entry.filename} in {path} is {entry.file_size:,} bytes, too large for a photo: remove it")
    try:
        return held.read(entry)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BadInput(f"{entry.filename} in {path} is damaged ({error}): create or copy the zip again") from error
    except (RuntimeError, NotImplementedError) as error:  # a password, or a compression that Python does not support
        raise BadInput(
            f"{entry.filename} in {path} can't be read ({error}): create the zip again without encryption "
            "or special compression"
        ) from error
