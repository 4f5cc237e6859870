"""What the sources that are data sets share: they are read through `datasets`, and are not unpacked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput, reason_of
from finetune.data.set_rows import DatasetRows, MappedRows, StreamedRows
from finetune.data.sources.base import Opened, Source
from finetune.families.digests import file_hashes

ANY_SPLIT = "train"  # of several splits


@dataclass(frozen=True)
class NamedDataSet:
    """A data set as `datasets.load_dataset` takes it.

    loader: "parquet", ..., or a hub id.
    splits: split -> its files; empty where only `datasets` knows them.
    arguments: further ones of `load_dataset`.
    """

    loader: str
    splits: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    revision: str = ""


class DataSet(Source):
    """A Hugging Face data set: rows with an image column and perhaps a caption column."""

    @abstractmethod
    def named(self, path: Path) -> NamedDataSet:
        """Returns how `datasets` loads what `data.photos` names.

        Raises:
            BadInput: there is no such data set.
        """

    def open(self, path: Path) -> Opened:
        """Returns the data set as a table.

        Raises:
            BadInput: it does not exist or can't be read; it has no such split or column; it has no usable image.
        """
        from finetune.data.tables import TableFacts, Wanted, open_table  # they import torch

        options, named = self.options, self.named(path)
        split = chosen_split(list(named.splits), options.split, str(path))
        files = sorted(named.splits.get(split, ()))
        facts = TableFacts(path.name, _digests(files, path), named.revision, split)
        rows = self.rows(path, named, split)
        wanted = Wanted(options.image_column, options.caption_column, options.further)
        return Opened(path, table=open_table(path, rows, facts, wanted, options.workers))

    def rows(self, path: Path, named: NamedDataSet, split: str) -> DatasetRows:
        """Returns the rows of a split, which are loaded when they are first read."""
        data_files = {
            name: [str(file) for file in files] for name, files in named.splits.items() if name == split and files
        }
        arguments = {**named.arguments, **({"data_files": data_files} if data_files else {})}
        streaming, name = self.options.streaming, str(path)

        def load() -> Any:
            return load_split(named.loader, name, split=split, streaming=streaming, **arguments)

        kind = StreamedRows if streaming else MappedRows
        return kind(load, [path if path.is_dir() else path.parent], name)


def chosen_split(splits: Sequence[str], wanted: str | None, name: str) -> str:
    """The split of a data set to train on: the one `wanted`, the only one, or "train".

    Raises:
        BadInput: there is no such split; the message lists them.
    """
    if wanted in splits:
        assert wanted is not None
        return wanted
    listed = ", ".join(splits)
    if wanted is not None:
        raise BadInput(f"the data set {name} has no split {wanted!r} (data.split): it has {listed}")
    if len(splits) == 1:
        return splits[0]
    if ANY_SPLIT not in splits:
        raise BadInput(f"the data set {name} has the splits {listed}: choose one with data.split")
    return ANY_SPLIT


def load_split(loader: str, name: str, **arguments: Any) -> Any:
    """Calls `datasets.load_dataset`. Its bars are not shown.

    A streamed parquet file on this disk is read without Arrow's read-ahead, which keeps the whole file in memory.

    Raises:
        BadInput: it can't be loaded, for example because the network or a file is missing.
    """
    if loader == "parquet" and arguments.get("streaming"):
        from pyarrow.dataset import ParquetFragmentScanOptions

        arguments["fragment_scan_options"] = ParquetFragmentScanOptions(pre_buffer=False)
    with without_bars() as datasets:
        try:
            return datasets.load_dataset(loader, **arguments)
        except MemoryError:
            raise
        except Exception as error:  # of the network, of Arrow, of tar files, of JSON: whatever reads the files
            raise BadInput(
                f"the data set {name} can't be read ({reason_of(error)}): check its name and its files"
            ) from error


@contextmanager
def without_bars() -> Iterator[Any]:
    """Gives the module `datasets`, whose progress bars are off inside the block."""
    import datasets

    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        if shown:
            datasets.enable_progress_bars()


def split_of(file: Path) -> str:
    """The split that a file's name says, as the hub's data sets do: train-00000-of-00004.parquet; else "train"."""
    stem = file.name.split(".")[0].lower()
    known = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
    return known.get(stem.split("-")[0].split("_")[0], ANY_SPLIT)


def files_by_split(path: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """The files of a data set: `path` itself, or those in it or in its folder data/, by their split."""
    if path.is_file():
        return {ANY_SPLIT: [path]}
    folders = [folder for folder in (path, path / "data") if folder.is_dir()]
    found: dict[str, list[Path]] = {}
    for file in sorted(file for folder in folders for file in folder.iterdir()):
        if file.name.lower().endswith(tuple(suffixes)) and not file.name.startswith(".") and file.is_file():
            found.setdefault(split_of(file), []).append(file)
    return found


def not_empty(found: dict[str, list[Path]], path: Path, what: str) -> dict[str, list[Path]]:
    """Returns `found`. Raises: BadInput: it is empty, so that `path` holds no such files."""
    if not any(found.values()):
        raise BadInput(
            f"{path} holds no {what}: give the file or the folder that does, or another data.source", path=path
        )
    return found


def _digests(files: Sequence[Path], path: Path) -> dict[str, str]:
    """Each file below `path` -> SHA-256. Gigabytes are hashed once, see `finetune.families.digests`."""
    home = path if path.is_dir() else path.parent
    hashes = file_hashes(files)
    return {file.relative_to(home).as_posix(): hashes[file] for file in files}
