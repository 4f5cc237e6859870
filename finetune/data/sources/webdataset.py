"""WebDataset: tar files in which the files of one sample share a name, 000.jpg and 000.txt."""

from __future__ import annotations

from pathlib import Path

from finetune.data.photos import image_files
from finetune.data.sources.data_set import DataSet, NamedDataSet, files_by_split, not_empty

SUFFIX = ".tar"


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
