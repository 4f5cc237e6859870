"""WebDataset: tar files in which the files of one sample share a name, 000.jpg and 000.txt."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput
from finetune.data.photos import APPLE, SUFFIXES, image_files
from finetune.data.set_rows import DatasetRows
from finetune.data.sources.data_set import DataSet, NamedDataSet, files_by_split, not_empty

SUFFIX = ".tar"
BLOCK, MAGIC, MAGIC_AT = 512, b"ustar", 257  # POSIX pax: a header has the magic, and two blocks of zeros are the end
TEXTS = {"txt", "text", "transcript"}  # endings that `datasets` reads as text
LOOKED_AT = 64  # files of each tar file whose names say which columns there are


class WebDataset(DataSet):
    """A tar file, or a folder of them. Columns are the endings: jpg, txt, json."""

    name = "webdataset"

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Returns whether the path is a file that ends in .tar, or a folder with such files and no photos."""
        if path.is_file():
            return path.suffix.lower() == SUFFIX
        return path.is_dir() and not image_files(path) and bool(files_by_split(path, [SUFFIX]))

    def named(self, path: Path) -> NamedDataSet:
        """Returns the shards of each split."""
        return NamedDataSet("webdataset", not_empty(files_by_split(path, [SUFFIX]), path, "tar files"))

    def rows(self, path: Path, named: NamedDataSet, split: str) -> DatasetRows:
        """As `DataSet.rows`. Cut files are found here: where one ends between two samples, nothing else tells."""
        files = named.splits[split]
        for file in files:
            _refuse_cut(file)
        columns = _columns(files)
        arguments = {**named.arguments, **({"features": columns} if columns else {})}
        return super().rows(path, replace(named, arguments=arguments), split)


def _refuse_cut(file: Path) -> None:
    """Compressed files say so themselves when they are read."""
    with file.open("rb") as held:
        is_plain = held.read(BLOCK)[MAGIC_AT:].startswith(MAGIC)
        size = held.seek(0, os.SEEK_END)
        held.seek(max(0, size - 2 * BLOCK))
        if is_plain and any(held.read()):
            raise BadInput(f"the end of {file} is missing, as after a copy that was cut off: copy it again", path=file)


def _columns(files: Sequence[Path]) -> Mapping[str, Any] | None:
    """The columns as `datasets.Features`, where not all samples have the same: it would look at the first five, and
    take no others. None where they have, or the files can't be read, which it says itself."""
    try:
        samples = [sample for file in files for sample in _first_samples(file)]
    except (tarfile.TarError, OSError, EOFError):
        return None
    endings = set().union(*samples)
    return None if all(own == endings for own in samples) else _features(endings)


def _first_samples(file: Path) -> list[set[str]]:
    """The endings of each of the first samples."""
    samples: dict[str, set[str]] = {}
    with tarfile.open(file, encoding="utf-8") as held:
        members = list(islice(held, LOOKED_AT))
    for member in members:
        folder, name = posixpath.split(member.name)
        stem, _, ending = name.partition(".")
        if member.isfile() and stem and ending:
            samples.setdefault(f"{folder}/{stem}", set()).add(ending)
    if len(members) == LOOKED_AT and samples:
        samples.popitem()  # the others of its files may come next
    return list(samples.values())


def _features(endings: set[str]) -> Mapping[str, Any]:
    """Images and texts alone: what else a sample has would need a type of its own."""
    import datasets

    last = {ending: ending.rpartition(".")[2].lower() for ending in sorted(endings)}
    images = {ending: datasets.Image() for ending, kind in last.items() if f".{kind}" in SUFFIXES | APPLE}
    texts = [ending for ending, kind in last.items() if kind in TEXTS]
    strings = {name: datasets.Value("string") for name in ("__key__", "__url__", *texts)}
    found: Mapping[str, Any] = datasets.Features(images | strings)
    return found
