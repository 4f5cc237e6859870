"""Sources: what `data.photos` can name. To add one, add a file to this package.

A source gives a folder with photos, masks and captions as files, or a table: the images and captions of a data set,
which are not unpacked. The same source must always give the same photos, so that a resumed run equals an uninterrupted
one.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from finetune.core.errors import BadInput
from finetune.core.files import cache_dir, replacing, sha256
from finetune.data.captions import BESIDE, LISTS
from finetune.data.leftovers import listed
from finetune.data.photos import APPLE, SUFFIXES, SUFFIXES_SHOWN

if TYPE_CHECKING:
    from finetune.data.tables import Table


@dataclass(frozen=True)
class SourceOptions:
    """The recipe's settings of data sets (`data:`). A folder has none of them.

    further: the columns of other captions that `data.caption_mix` names.
    """

    split: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    streaming: bool = False
    workers: int = 1
    further: tuple[str, ...] = ()


@dataclass(frozen=True)
class Opened:
    """A source as a folder, or as the `table` of a data set. `unused` is a sentence about what of it is not used, or
    empty."""

    folder: Path
    unused: str = ""
    table: Table | None = None


class Source(ABC):
    """One kind of source. `name` is its name in messages."""

    name: ClassVar[str]

    def __init__(self, options: SourceOptions = SourceOptions()) -> None:
        self.options = options

    @classmethod
    @abstractmethod
    def matches(cls, path: Path) -> bool:
        """Returns whether the path is a source of this kind. `data.source` can name a kind that never matches."""

    @abstractmethod
    def open(self, path: Path) -> Opened:
        """Returns the photos and captions as a folder.

        Raises:
            BadInput: the source can't be read; the message names the file inside.
        """


class Packed(Source):
    """A file that contains photos and captions. They are unpacked to a folder in the cache, named by its hash."""

    @abstractmethod
    def files(self, path: Path) -> Iterable[tuple[str, bytes]]:
        """Gives (name, content) of each file inside, in any order: photos, masks, captions and all other files.

        Raises:
            BadInput: it can't be read.
        """

    def open(self, path: Path) -> Opened:
        """Unpacks the photos, masks and captions to the cache and returns that folder.

        Raises:
            BadInput: the file can't be read, holds no images, or holds two files of one name.
        """
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
            raise BadInput(f"{path} holds no images ({SUFFIXES_SHOWN}): give one with photos in it")
        return Opened(folder, f"not used from {path.name}: {listed(sorted(unused))}" if unused else "")


def is_usable(name: str) -> bool:
    """Returns whether a file with this name can be a photo, a mask or a caption file."""
    return name in LISTS or Path(name).suffix.lower() in {*SUFFIXES, *APPLE, *BESIDE}


def _write(file: Path, content: bytes) -> None:
    """Writes a file atomically, because several processes may write the same one."""
    if file.is_file() and file.read_bytes() == content:
        return
    with replacing(file) as temporary:
        temporary.write_bytes(content)
