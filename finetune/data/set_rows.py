"""The images of a Hugging Face data set by row, through `datasets`: memory-mapped, or streamed.

Nothing is unpacked to files: the stored bytes of an image are read when it is decoded.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetune.core.errors import BadInput, first_line

T = TypeVar("T")
LET_GO = 128_000_000  # bytes read from mapped files before they are mapped anew: pages that were read count as memory
BEHIND = 64  # images of a stream that are kept, since workers ask a little out of order

Loader = Callable[[], Any]  # returns a `datasets.Dataset` or `IterableDataset` of one split


class DatasetRows(ABC):
    """The images and texts of one split of a data set. It is loaded at the first access.

    Args:
        load: loads the split.
        roots: folders in which the files may lie that the data set names instead of holding them.
        name: the data set, for messages.
    """

    def __init__(self, load: Loader, roots: Sequence[Path], name: str) -> None:
        self._load, self.roots, self.name = load, roots, name
        self.image = ""
        self._lock = threading.Lock()

    @property
    @abstractmethod
    def features(self) -> Mapping[str, Any]:
        """Column -> its type in `datasets`. A data set without rows has none."""

    @property
    def count(self) -> int:
        """The number of rows; 0 where it is not known before they are read."""
        return 0

    @abstractmethod
    def scanned(self, captions: Sequence[str]) -> Iterator[tuple[bytes | None, list[Any]]]:
        """Gives each row's stored image (None where it has none) and what its columns of captions hold."""

    @abstractmethod
    def content(self, number: int) -> bytes | None:
        """The stored image of row `number` (from 0)."""

    def _bytes(self, held: Any) -> bytes | None:
        """The bytes of what `datasets` gives for an image that is not decoded."""
        if held is None or (held["bytes"] is None and held["path"] is None):
            return None
        if held["bytes"] is not None:
            return bytes(held["bytes"])
        file = Path(held["path"]).resolve()
        if not any(file.is_relative_to(root.resolve()) for root in self.roots):
            raise BadInput(
                f"{self.name} names {held['path']}, which is not inside its folder: use a data set that holds its "
                "images"
            )
        return file.read_bytes()


class MappedRows(DatasetRows):
    """Read by number from the Arrow files that `datasets` keeps in its cache, mapped into memory."""

    def __init__(self, load: Loader, roots: Sequence[Path], name: str) -> None:
        super().__init__(load, roots, name)
        self._whole: Any = None
        self._images: Any = None
        self._read = 0

    @property
    def features(self) -> Mapping[str, Any]:
        return dict(self._mapped().features or {})

    @property
    def count(self) -> int:
        return len(self._mapped())

    def scanned(self, captions: Sequence[str]) -> Iterator[tuple[bytes | None, list[Any]]]:
        for number in range(self.count):
            yield self.content(number), [self._mapped()[column][number] for column in captions]

    def content(self, number: int) -> bytes | None:
        with self._lock:
            if self._read > LET_GO:
                self._whole, self._images, self._read = None, None, 0
            if self._images is None:
                self._images = _undecoded(self._mapped().select_columns([self.image]), self.image)
            found = self._bytes(self._images[number][self.image])
            self._read += len(found or b"")
        return found

    def _mapped(self) -> Any:
        if self._whole is None:
            self._whole = self._load()
        return self._whole


class StreamedRows(DatasetRows):
    """Read from the first row on, without a copy on this disk. Going back begins anew."""

    def __init__(self, load: Loader, roots: Sequence[Path], name: str) -> None:
        super().__init__(load, roots, name)
        self._features: dict[str, Any] | None = None
        self._rows: Iterator[Any] | None = None
        self._next = 0
        self._kept: OrderedDict[int, bytes | None] = OrderedDict()

    @property
    def features(self) -> Mapping[str, Any]:
        if self._features is None:
            loaded = self._load()
            self._features = dict(loaded.features or dict.fromkeys(next(iter(loaded), {})))
        return self._features

    def scanned(self, captions: Sequence[str]) -> Iterator[tuple[bytes | None, list[Any]]]:
        for row in self._begun():
            yield self._bytes(row[self.image]), [row[column] for column in captions]

    def whole(self) -> Iterator[tuple[bytes | None, str, dict[str, Any]]]:
        """Gives each row's stored image, the name of its file (or empty) and its other columns."""
        for row in self._begun():
            held = row.pop(self.image)
            yield self._bytes(held), (held or {}).get("path") or "", row

    def content(self, number: int) -> bytes | None:
        with self._lock:
            if number not in self._kept:
                self._go_to(number)
            return self._kept[number]

    def _go_to(self, number: int) -> None:
        if self._rows is None or number < self._next:
            self._rows, self._next = self._begun(), 0
            self._kept.clear()
        for row in itertools.islice(self._rows, number + 1 - self._next):
            self._kept[self._next] = self._bytes(row[self.image])
            self._next += 1
            if len(self._kept) > BEHIND:
                self._kept.popitem(last=False)
        if number >= self._next:
            raise BadInput(f"{self.name} ended after {self._next} rows and had more when it was scanned: start again")

    def _begun(self) -> Iterator[Any]:
        return iter(_undecoded(self._load(), self.image))


def _undecoded(rows: Any, column: str) -> Any:
    """The rows with an image column of stored bytes: its files are decoded by us, with our limits."""
    import datasets

    return rows.cast_column(column, datasets.Image(decode=False))


def to_the_end(rows: Iterator[T], name: str) -> Iterator[T]:
    """Gives all `rows` of the data set `name`.

    Raises:
        BadInput: its files can't be read any further.
    """
    try:
        yield from rows
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # of Arrow, of tar files, of the network: whatever reads the files
        raise BadInput(f"the data set {name} can't be read to its end ({first_line(error)}): copy it again") from error


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One image of a data set, as `finetune.data.photos.Stored`."""

    rows: DatasetRows
    number: int

    def read(self) -> bytes:
        """Returns the stored bytes.

        Raises:
            BadInput: the row has none any more.
        """
        found = self.rows.content(self.number)
        if found is None:
            raise BadInput(f"row {self.number} of {self.rows.name} has no image any more: start the run again")
        return found
