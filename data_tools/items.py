"""The images of anything that `data.photos` can name, one after the other, with captions and further columns.

A folder's files are named; of a data set the rows are read in their order, through `datasets`, without a copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.endings import damage_of, damage_of_bytes, ending_of
from data_tools.photo_set import Entry, read_set
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.data.decoding import BadImage, opened, shown
from finetune.data.set_rows import StreamedRows, to_the_end
from finetune.data.sources.base import SourceOptions
from finetune.data.sources.data_set import DataSet, chosen_split
from finetune.data.sources.registry import AUTO, SOURCES
from finetune.data.tables import caption_column, image_column, texts_of

PLAIN = re.compile(r"[\w][\w .+()-]{0,150}")  # a stem that every file system can have
KEYS = ("__key__", "__url__")  # what `datasets` adds to the columns of tar shards
READ = 1_000_000  # bytes of a file that tell its format, at most
TAKEN = ("file_name", "text", "image")  # columns that each written list has of its own
OPTIONS = {"data.image_column": "--image", "data.caption_column": "--caption", "data.split": "--split"}
OTHER = "other_"  # before the name of a further column that is called so


@dataclass(frozen=True)
class DataSetOptions:
    """How a data set is read: `source` as `data.source`, the split and columns; None: as training finds them."""

    source: str = AUTO
    split: str | None = None
    image: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Item:
    """An image: its new name with the ending of its format, its bytes, caption and further columns.

    `fault`: why it can't be used, or empty. `entry`: of a folder's photo. `label`: of a data set's row.
    """

    name: str
    read: Callable[[], bytes]
    size: int
    caption: str | None
    row: Mapping[str, Any]
    source: Path
    fault: str = ""
    entry: Entry | None = None
    label: str = ""

    @property
    def stem(self) -> str:
        """Its name without the ending."""
        return PurePosixPath(self.name).stem


@dataclass(frozen=True)
class Items:
    """All images of `source`. `folder`: where they are. `notes`: what of it is not used."""

    source: Path
    folder: Path
    items: list[Item]
    notes: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)


def read_items(source: Path, options: DataSetOptions = DataSetOptions()) -> Items:
    """Reads what `source` holds. An image is a fault without a right header, or if it can't be decoded to its end;
    that is tried where its last bytes do not show it.

    Raises:
        BadInput: there are no images, or the data set has no such split or column.
    """
    source = Path(source).expanduser()
    kind = _kind(source, options)
    if kind is None:
        return _of_folder(source, options)
    with _options_named():
        return _of_rows(source, kind, options)


@contextmanager
def _options_named() -> Iterator[None]:
    """Names the command's options in messages that name a recipe's keys."""
    try:
        yield
    except BadInput as error:
        text = str(error)
        for key, option in OPTIONS.items():
            text = text.replace(key, option)
        if text == str(error):
            raise
        raise BadInput(text, path=error.path) from error


def _kind(source: Path, options: DataSetOptions) -> type[DataSet] | None:
    """The data set's class; None for a folder or a .zip."""
    if options.source != AUTO:
        if options.source not in SOURCES:
            raise BadInput(f"--source is {options.source!r}: choose {AUTO}, {', '.join(SOURCES)}")
        chosen = SOURCES[options.source]
        return chosen if issubclass(chosen, DataSet) else None
    found = [each for each in SOURCES.values() if issubclass(each, DataSet) and each.matches(source)]
    return found[0] if found else None


def _of_folder(source: Path, options: DataSetOptions) -> Items:
    given = [name for name in ("split", "image", "caption") if getattr(options, name) is not None]
    if given:
        raise BadInput(f"--{given[0]} is for data sets, but {source} is not one: leave it out, or give --source")
    photos = read_set(source)
    items = []
    with phase("Reading", len(photos.entries), "photos") as advance:
        for entry in photos.entries:
            fault = _fault_of(entry.path)
            size = entry.path.stat().st_size if entry.path.exists() else 0
            caption, row = entry.caption, entry.row
            items.append(
                Item(entry.name, entry.path.read_bytes, size, caption, row, entry.path, fault=fault, entry=entry)
            )
            advance(1, "")
    return Items(source, photos.folder, items, photos.notes)


def _fault_of(file: Path) -> str:
    """Why a file can't be used, as far as its name and first bytes say, or empty."""
    if shown(file) != str(file):
        return "its name is not UTF-8: rename it"
    try:
        with file.open("rb") as held:
            start = held.read(READ)
            if not start:
                return "empty file"
            ending, fault = _format_of(file, start)
            return fault or damage_of(file, held, ending)
    except OSError as error:
        return error.strerror or type(error).__name__


def _format_of(file: Path, content: bytes) -> tuple[str, str]:
    """The ending that fits the content, and why it is no image, or empty."""
    try:
        with opened(file, content) as image:
            return ending_of(image), ""
    except BadImage as fault:
        return "", fault.reason


def _of_bytes(name: Path, content: bytes) -> tuple[str, str]:
    ending, fault = _format_of(name, content)
    return ending, fault or damage_of_bytes(name, content, ending)


def _of_rows(source: Path, kind: type[DataSet], options: DataSetOptions) -> Items:
    rows = _rows(source, kind, options)
    name = str(source)
    features = rows.features
    if not features:
        raise BadInput(f"the data set {name} has no rows: give one with images")
    rows.image = image_column(features, options.image, name)
    caption = caption_column(features, options.caption, name)
    items: list[Item] = []
    names: set[str] = set()
    lost: dict[str, str] = {}
    renamed: dict[str, str] = {}
    with phase("Reading", 0, "photos") as advance:
        for number, (content, path, row) in enumerate(to_the_end(rows.whole(), name)):
            row |= row.pop("json") if isinstance(row.get("json"), dict) else {}  # of tar shards
            others = [column for column in row if column not in (rows.image, caption, *KEYS)]
            columns, captions = _plain(row, others, lost), texts_of(row.get(caption) if caption else None)
            columns |= {f"{caption}_{index}": text for index, text in enumerate(captions[1:], 2)}
            columns = _free(columns, renamed)
            ending, fault = ("", "no image") if content is None else _of_bytes(Path(f"row {number}"), content)
            stem = _stem(str(row.get("__key__") or path), number, names)
            items.append(
                Item(
                    f"{stem}.{ending}", _reader(rows, number), len(content or b""), captions[0] if captions else None,
                    columns, source, fault, label=f"row {number}",
                )
            )  # fmt: skip
            advance(1, "")
    notes = [f"{column}: {why}" for column, why in lost.items()]
    notes += [f"the column {old} is written as {new}: lists have an own {old}" for old, new in renamed.items()]
    return Items(source, source, items, tuple(notes), lost)


def _rows(source: Path, kind: type[DataSet], options: DataSetOptions) -> StreamedRows:
    data_set = kind(SourceOptions(streaming=True))
    named = data_set.named(source)
    rows = data_set.rows(source, named, chosen_split(list(named.splits), options.split, str(source)))
    assert isinstance(rows, StreamedRows)
    return rows


def _reader(rows: StreamedRows, number: int) -> Callable[[], bytes]:
    def read() -> bytes:
        return rows.content(number) or b""

    return read


def _plain(row: Mapping[str, Any], columns: Sequence[str], lost: dict[str, str]) -> dict[str, Any]:
    """The columns that JSON can hold. Others are named once in `lost`."""
    found = {}
    for column in columns:
        value = row.get(column)
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            kind = f"{value}" if isinstance(value, float) else type(value).__name__
            lost.setdefault(column, f"left out where it holds {kind}, which a list of captions can't hold")
            continue
        if value is not None:
            found[column] = value
    return found


def _free(columns: dict[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    """The columns under names that no list has of its own. New names are noted in `renamed`."""
    found = {}
    for column, value in columns.items():
        name = column
        while name in TAKEN or (name != column and name in columns):
            name = f"{OTHER}{name}"
        if name != column:
            renamed[column] = name
        found[name] = value
    return found


def _stem(path: str, number: int, taken: set[str]) -> str:
    """A row's own name, if every file system can have it and no other row has it; else its number."""
    place = PurePosixPath(path.replace("\\", "/"))
    own = place.stem if place.suffix and len(place.suffix) <= 5 else place.name
    stem = own if PLAIN.fullmatch(own) and not own.endswith((" ", ".")) and "." not in own else f"{number:05d}"
    if stem.lower() in taken:
        stem = f"{number:05d}"
    if stem.lower() in taken:
        stem = f"row-{number:07d}"
    taken.add(stem.lower())
    return stem
