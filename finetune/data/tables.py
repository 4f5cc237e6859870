"""A data set as photos and captions: its columns are found, and its images are scanned once and remembered.

What a scan found (sizes, SHA-256 of every image, captions) is kept in the cache by the contents of the data set's
files, so that a later start reads no image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.files import cache_dir
from finetune.core.parallel import mapped
from finetune.core.reading import parse_json
from finetune.data.buckets import shared_pair
from finetune.data.decoding import BadImage
from finetune.data.entries import load_entry, save_entry
from finetune.data.photos import Photo, photo_of
from finetune.data.set_rows import DatasetRow, DatasetRows, to_the_end

VERSION = 2  # of the scan: another one is scanned again
IMAGES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")  # names of columns, the best first
CAPTIONS = ("text", "caption", "prompt", "captions", "txt", "description")
SHOWN = 5  # bad rows that a message names


@dataclass(frozen=True)
class TableFacts:
    """What a data set is, by content. A run records it.

    name: for messages.
    files: each of its files -> SHA-256; empty for one from the hub, of which `revision` has the hub id and the commit.
    columns: "image" and, where captions come from one, "caption" -> the column.
    content: SHA-256 over the digests of all images and over all captions, in their order.
    """

    name: str
    files: dict[str, str]
    revision: str = ""
    split: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    content: str = ""


@dataclass(frozen=True)
class Table:
    """The usable images of a data set, their captions (several are possible for each), and why others are not used.

    further: column -> other captions, as `captions`.
    """

    facts: TableFacts
    photos: list[Photo]
    captions: list[list[str]]
    bad: list[BadImage]
    further: dict[str, list[list[str]]] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """A sentence with the number of rows that can't be used, and the first of them with their reasons."""
        shown = ", ".join(f"{fault.file.name} ({fault.reason})" for fault in self.bad[:SHOWN])
        more = f" and {len(self.bad) - SHOWN} more" if len(self.bad) > SHOWN else ""
        return f"{len(self.bad)} of {len(self.photos) + len(self.bad)} rows can't be used: {shown}{more}"


@dataclass(frozen=True)
class Wanted:
    """The columns that a recipe names; None: the usual names. further: of `data.caption_mix`."""

    image: str | None
    caption: str | None
    further: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Scan:
    """What is kept of a scan. `sizes` [n, 2] int32, `digests` [n, 32] uint8, and for the rows that can't be used, in
    `bad`, zeros."""

    columns: dict[str, str]
    sizes: np.ndarray
    digests: np.ndarray
    captions: list[list[str]]
    bad: dict[int, str]
    further: dict[str, list[list[str]]] = field(default_factory=dict)


def open_table(path: Path, rows: DatasetRows, facts: TableFacts, wanted: Wanted, workers: int) -> Table:
    """Returns the photos and captions of a data set. Its images are decoded the first time to check them.

    Args:
        path: what the recipe names; each photo is named as a row of it.
        facts: what is known before the scan: name, files, revision and split.

    Raises:
        BadInput: a column is missing or holds something else, or there is no row, or none that can be used.
    """
    told = [VERSION, _readers(), facts.files, facts.revision, facts.split, wanted.image, wanted.caption]
    source = json.dumps([*told, *([list(wanted.further)] if wanted.further else [])])
    folder = cache_dir() / "tables"
    scan = _restored(load_entry(folder, source))
    if scan is None:
        scan = _scanned(path, rows, facts.name, wanted, workers)
        save_entry(folder, source, _tensors(scan))
    rows.image = scan.columns["image"]
    return _table(path, rows, facts, scan)


def _readers() -> list[str]:
    """What decodes images: with another one, rows that could not be read may be."""
    try:
        heic = metadata.version("pillow-heif")
    except metadata.PackageNotFoundError:
        heic = "none"
    return [PIL.__version__, heic]


def _table(path: Path, rows: DatasetRows, facts: TableFacts, scan: _Scan) -> Table:
    good = [number for number in range(len(scan.sizes)) if number not in scan.bad]
    sizes, digests = scan.sizes.tolist(), [row.tobytes().hex() for row in scan.digests]
    photos = [
        Photo(
            _named(path, number),
            shared_pair(*sizes[number]),
            digests[number],
            stored=DatasetRow(rows, number),
        )
        for number in good
    ]
    captions = [scan.captions[number] for number in good]
    bad = [BadImage(_named(path, number), reason) for number, reason in sorted(scan.bad.items())]
    facts = replace(facts, columns=scan.columns, rows=len(scan.sizes), content=content_of(photos, captions))
    further = {column: [texts[number] for number in good] for column, texts in scan.further.items()}
    return Table(facts, photos, captions, bad, further)


def content_of(photos: Sequence[Photo], captions: Sequence[Sequence[str]]) -> str:
    """SHA-256 over the digests of all images and over all captions, in their order."""
    content = hashlib.sha256("\n".join(photo.digest for photo in photos).encode())
    content.update(json.dumps(captions).encode())
    return content.hexdigest()


def _named(path: Path, number: int) -> Path:
    return path / f"row {number}"


def _scanned(path: Path, rows: DatasetRows, name: str, wanted: Wanted, workers: int) -> _Scan:
    features = rows.features
    if not features:
        raise BadInput(f"the data set {name} has no rows: give one with images")
    rows.image = image_column(features, wanted.image, name)
    caption = caption_column(features, wanted.caption, name)
    columns = {"image": rows.image} | ({"caption": caption} if caption else {})
    for column in wanted.further:
        _check_further(features, column, name)
    sizes, digests, captions, bad = [], [], [], {}
    with phase("Photos", rows.count, "photos") as advance:
        read = to_the_end(rows.scanned([*([caption] if caption else []), *wanted.further]), name)
        items = ((path, number, *row) for number, row in enumerate(read))
        for number, (photo, fault, texts) in enumerate(mapped(_checked, items, workers)):
            sizes.append(photo.size if photo else (0, 0))
            digests.append(bytes.fromhex(photo.digest) if photo else bytes(32))
            captions.append(texts if caption else [[], *texts])
            if fault:
                bad[number] = fault
            advance(1, "")
    if not sizes:
        raise BadInput(f"the data set {name} has no rows: give one with images")
    if len(bad) == len(sizes):
        raise BadInput(
            f"no image of the data set {name} can be used: row 0 ({bad[0]}): name another data.image_column"
        )
    held = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)
    further = {column: [texts[place] for texts in captions] for place, column in enumerate(wanted.further, 1)}
    return _Scan(columns, np.array(sizes, dtype=np.int32), held, [texts[0] for texts in captions], bad, further)


def _check_further(features: Mapping[str, Any], column: str, name: str) -> None:
    if column not in features or not _holds_text(features[column]):
        raise BadInput(
            f"data.caption_mix names {column!r}, which is no column of text in the data set {name}: it has "
            f"{', '.join(features)}"
        )


def _checked(item: tuple[Path, int, bytes | None, list[Any]]) -> tuple[Photo | None, str, list[list[str]]]:
    """A row's photo, or why it can't be used; and the captions of each column."""
    path, number, content, columns = item
    kept = [texts_of(held) for held in columns]
    if content is None:
        return None, "no image", kept
    try:
        return photo_of(_named(path, number), content), "", kept
    except BadImage as fault:
        return None, fault.reason, kept


def texts_of(held: Any) -> list[str]:
    """The captions in a cell of a data set, which is a text, a list of texts, or empty."""
    texts = [held] if isinstance(held, str) else list(held or [])
    return [" ".join(each.split()) for each in texts if isinstance(each, str) and each.strip()]


def image_column(features: Mapping[str, Any], wanted: str | None, name: str) -> str:
    """The column of a data set with its images: the one `wanted`, the only one of images, or one with a usual name.

    Raises:
        BadInput: there is none, or several; the message lists the columns.
    """
    listed = ", ".join(features)
    if wanted is not None:
        if wanted not in features:
            raise BadInput(f"the data set {name} has no column {wanted!r} (data.image_column): it has {listed}")
        if not _holds_images(features[wanted]):
            raise BadInput(
                f"data.image_column is {wanted!r}, which holds {_kind(features[wanted])} and no images, in the data "
                f"set {name}: it has {listed}"
            )
        return wanted
    of_images = [column for column, kind in features.items() if type(kind).__name__ == "Image"]
    if len(of_images) == 1:
        return of_images[0]
    usual = [column for column in IMAGES if column in features and _holds_images(features[column])]
    if not usual:
        raise BadInput(
            f"the data set {name} has no column of images that is known: name one of {listed} with data.image_column"
        )
    return usual[0]


def caption_column(features: Mapping[str, Any], wanted: str | None, name: str) -> str | None:
    """The column of a data set with its captions: the one `wanted`, or one of text with a usual name, or None.

    Raises:
        BadInput: `wanted` is not there, or holds no text; the message lists the columns.
    """
    listed = ", ".join(features)
    if wanted is None:
        return next((column for column in CAPTIONS if column in features and _holds_text(features[column])), None)
    if wanted not in features:
        raise BadInput(f"the data set {name} has no column {wanted!r} (data.caption_column): it has {listed}")
    if not _holds_text(features[wanted]):
        raise BadInput(
            f"data.caption_column is {wanted!r}, which holds {_kind(features[wanted])} and no text, in the data set "
            f"{name}: it has {listed}"
        )
    return wanted


def _holds_images(kind: Any) -> bool:
    """An image, its bytes, or a record of bytes and path, as files without a note of `datasets` have them."""
    binary = getattr(kind, "dtype", "") in ("binary", "large_binary")
    return kind is None or type(kind).__name__ == "Image" or binary or (isinstance(kind, dict) and "bytes" in kind)


def _holds_text(kind: Any) -> bool:
    inner = getattr(kind, "feature", kind)  # of a list of captions
    return kind is None or getattr(inner, "dtype", "") in ("string", "large_string", "string_view")


def _kind(kind: Any) -> str:
    return str(getattr(kind, "dtype", None) or type(kind).__name__)


def _tensors(scan: _Scan) -> dict[str, torch.Tensor]:
    parts = [scan.columns, scan.captions, sorted(scan.bad.items()), *([scan.further] if scan.further else [])]
    told = json.dumps(parts).encode()
    return {
        "sizes": torch.from_numpy(scan.sizes),
        "digests": torch.from_numpy(scan.digests.copy()),
        "told": torch.frombuffer(bytearray(told), dtype=torch.uint8),
    }


def _restored(tensors: Mapping[str, torch.Tensor] | None) -> _Scan | None:
    if tensors is None:
        return None
    told = parse_json(tensors["told"].numpy().tobytes().decode(), "the scan of a data set", list)
    columns, captions, bad, *further = told
    return _Scan(columns, tensors["sizes"].numpy(), tensors["digests"].numpy(), captions, dict(bad), *further)
