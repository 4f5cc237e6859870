"""Parquet files: one, or a folder of them, as the hub has them."""

from __future__ import annotations

from pathlib import Path

from finetune.data.photos import image_files
from finetune.data.sources.data_set import DataSet, Named, files_by_split, present

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

    def named(self, path: Path) -> Named:
        """Returns the files of each split."""
        return Named("parquet", present(files_by_split(path, [SUFFIX]), path, "parquet files"))
