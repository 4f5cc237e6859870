"""The source seam: what `data.photos` names -> a folder of photos with captions. A new one is one new file here.

Whatever it was, the photos of a run lie in a folder, with captions beside them: photos, masks and captions are files.
The same source gives the same files, so that a resumed run is the unbroken one.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from finetune.core.errors import BadInput
from finetune.core.files import cache_dir, replacing, sha256
from finetune.data.captions import BESIDE, LISTS
from finetune.data.leftovers import listed
from finetune.data.photos import APPLE, SUFFIXES, SUFFIXES_SHOWN


@dataclass(frozen=True)
class Opened:
    """A source as a folder; `unused`: a sentence about what of it is not used, or empty."""

    folder: Path
    unused: str = ""


class Source(ABC):
    """One kind of place. `name`: what it is called in messages."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def matches(cls, path: Path) -> bool:
        """Whether the path is such a place."""

    @abstractmethod
    def open(self, path: Path) -> Opened:
        """Its photos and captions as a folder.

        Raises:
            BadInput: it can't be read; the file inside is named.
        """


class Packed(Source):
    """A file that holds photos and captions. They are kept in the cache, by the file's content."""

    @abstractmethod
    def files(self, path: Path) -> Iterable[tuple[str, bytes]]:
        """(name, content) of each file in it, in any order: photos, masks and captions under their own names, and
        whatever else there is."""

    def open(self, path: Path) -> Opened:
        stem = re.sub(r"[^\w-]+", "-", path.stem)
        folder = cache_dir() / "photos" / f"{stem}-{sha256(path)[:16]}"
        written: set[str] = set()
        unused = []
        for name, content in self.files(path):
            if not is_usable(name):
                unused.append(name)
                continue
            if name.lower() in written:
                raise BadInput(f"{path} has two files {name!r}: give each its own name")
            written.add(name.lower())
            _write(folder / name, content)
        if not written:
            raise BadInput(f"{path} holds no pictures ({SUFFIXES_SHOWN}): give one with photos in it")
        return Opened(folder, f"not used of {path.name}: {listed(sorted(unused))}" if unused else "")


def is_usable(name: str) -> bool:
    """Whether a file of this name is a photo, a mask or a caption."""
    return name in LISTS or Path(name).suffix.lower() in {*SUFFIXES, *APPLE, *BESIDE}


def _write(file: Path, content: bytes) -> None:
    """Several processes write the same: each file appears whole."""
    if file.is_file() and file.read_bytes() == content:
        return
    with replacing(file) as temporary:
        temporary.write_bytes(content)
