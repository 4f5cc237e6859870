"""Writes images and captions as parquet files, WebDataset tar shards, or metadata.csv."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.items import Item

GROUP = 100  # rows of a parquet file that are written, and read, together
FIRST = 5  # samples of a tar file from which `datasets` infers its columns
LARGEST = 500_000_000  # bytes of images in one parquet file or tar shard


def parts(items: Sequence[Item], largest: int = LARGEST) -> list[list[Item]]:
    """The images in files of at most `largest` bytes (more only for a single image), in their order."""
    found: list[list[Item]] = []
    held = 0
    for item in items:
        if not found or (held + item.size > largest and found[-1]):
            found.append([])
            held = 0
        found[-1].append(item)
        held += item.size
    return found


def columns_of(items: Sequence[Item]) -> list[str]:
    """The further columns of all rows, in the order in which they come."""
    return list(dict.fromkeys(column for item in items for column in item.row))


def parquet_schema(items: Sequence[Item]) -> Any:
    """The Arrow schema: image (bytes and path), text, and further columns, as `datasets` notes it in the file.

    A column whose rows are of different kinds becomes JSON text.
    """
    import datasets
    import pyarrow

    features: dict[str, Any] = {"image": datasets.Image(), "text": datasets.Value("string")}
    for column in columns_of(items):
        if column in features:
            continue
        try:
            kind = pyarrow.array([item.row.get(column) for item in items]).type
            features[column] = datasets.Features.from_arrow_schema(pyarrow.schema([(column, kind)]))[column]
        except (pyarrow.ArrowException, ValueError, TypeError):
            features[column] = datasets.Value("string")
    return datasets.Features(features).arrow_schema


def write_parquet(path: Path, items: Sequence[Item], schema: Any) -> None:
    """Writes one parquet file, `GROUP` rows at a time."""
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(items), GROUP):
            rows = [_row(item, schema) for item in items[start : start + GROUP]]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def _row(item: Item, schema: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"image": {"bytes": item.read(), "path": item.name}, "text": item.caption}
    for column in schema.names:
        if column not in row:
            value = item.row.get(column)
            texts = str(schema.field(column).type) in ("string", "large_string")
            mixed = texts and value is not None and not isinstance(value, str)
            row[column] = json.dumps(value, ensure_ascii=False) if mixed else value
    return row


@dataclass(frozen=True)
class Shape:
    """What every sample of a set of tar shards has: `datasets` wants the same endings in all of them.

    ending: of the images; readers go by their content. columns: of NAME.json. lost: columns that are left out, since
    none of the first samples, from which `datasets` infers their kind, has one.
    """

    ending: str
    captions: bool
    columns: tuple[str, ...]
    lost: tuple[str, ...]


def shape_of(items: Sequence[Item]) -> Shape:
    """The shape of the samples in tar shards: the most frequent ending, and what any of them has."""
    ending = Counter(item.name.rpartition(".")[2] for item in items).most_common(1)[0][0]
    columns, known = columns_of(items), columns_of(items[:FIRST])
    lost = tuple(column for column in columns if column not in known)
    return Shape(ending, any(item.caption for item in items), tuple(known), lost)


def samples(items: Sequence[Item]) -> list[Item]:
    """The images under names that tar shards can have: a sample's name ends at its first dot, and is there once."""
    found: list[Item] = []
    taken = {item.stem for item in items if "." not in item.stem}
    used: set[str] = set()
    for item in items:
        key = stem = item.stem.replace(".", "_")
        number = 1
        while key in used or (key in taken and key != item.stem):
            number += 1
            key = f"{stem}-{number}"
        used.add(key)
        found.append(replace(item, name=f"{key}.{item.name.rpartition('.')[2]}"))
    return found


def write_shard(path: Path, items: Sequence[Item], shape: Shape) -> None:
    """Writes one tar file: NAME.jpg, NAME.txt with the caption, NAME.json with further columns.

    Nothing in it depends on the time or the user, so that the same images give the same file.
    """
    with tarfile.TarFile(path, "w") as held:
        for item in items:
            for name, content in _members(item, shape):
                about = tarfile.TarInfo(name)
                about.size = len(content)
                held.addfile(about, io.BytesIO(content))


def _members(item: Item, shape: Shape) -> Iterator[tuple[str, bytes]]:
    yield f"{item.stem}.{shape.ending}", item.read()
    if shape.captions:
        yield f"{item.stem}.txt", (item.caption or "").encode()
    if shape.columns:
        row = {column: item.row.get(column) for column in shape.columns}
        yield f"{item.stem}.json", json.dumps(row, ensure_ascii=False).encode()


def write_csv(path: Path, items: Sequence[Item]) -> None:
    """Writes metadata.csv: file_name, text and the further columns; what is no text as JSON."""
    columns = columns_of(items)
    with path.open("w", encoding="utf-8", newline="") as held:
        writer = csv.writer(held, lineterminator="\n")
        writer.writerow(["file_name", "text", *columns])
        for item in items:
            values = [item.row.get(column) for column in columns]
            writer.writerow([item.name, item.caption or "", *(_cell(value) for value in values)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
