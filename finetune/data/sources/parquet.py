"""Parquet files: one, or a folder of them, as the hub has them."""

from __future__ import annotations

from pathlib import Path

from finetune.core.errors import BadInput, reason_of
from finetune.data.photos import image_files
from finetune.data.set_rows import DatasetRows
from finetune.data.sources.data_set import DataSet, NamedDataSet, files_by_split, not_empty

SUFFIX = ".parquet"


class Parquet(DataSet):
    """A parquet file, or a folder of them without photos. A file's name says its split: test-00000.parquet."""

    name = "parquet"

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Returns whether the path is a file that ends in .parquet, or a folder with such files and no photos."""
        if path.is_file():
            return path.suffix.lower() == SUFFIX
        return path.is_dir() and not image_files(path) and bool(files_by_split(path, [SUFFIX]))

    def named(self, path: Path) -> NamedDataSet:
        """Returns the files of each split."""
        return NamedDataSet("parquet", not_empty(files_by_split(path, [SUFFIX]), path, "parquet files"))

    def rows(self, path: Path, named: NamedDataSet, split: str) -> DatasetRows:
        """As `DataSet.rows`. Files without a row are found here: `datasets` can't say that of them."""
        from pyarrow import ArrowException, parquet

        try:
            if not sum(parquet.read_metadata(file).num_rows for file in named.splits[split]):
                raise BadInput(f"the data set {path} has no rows: give one with images")
        except ArrowException as error:
            raise BadInput(f"the data set {path} can't be read ({reason_of(error)}): copy its files again") from error
        return super().rows(path, named, split)
