"""The image folder of `datasets`: images in sub-folders, with metadata.jsonl or metadata.csv beside them.

Only where `data.source` is imagefolder: a folder of photos, with captions beside them, is our own kind.
"""

from __future__ import annotations

import os
from pathlib import Path

from finetune.core.errors import BadInput
from finetune.data.photos import SUFFIXES
from finetune.data.sources.data_set import ANY_SPLIT, DataSet, NamedDataSet, not_empty, split_of

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class ImageFolder(DataSet):
    """Images at any depth. Sub-folders train, test and validation are splits."""

    name = "imagefolder"

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Returns False: see above."""
        return False

    def named(self, path: Path) -> NamedDataSet:
        """Returns the files of each split."""
        if not path.is_dir():
            raise BadInput(f"there is no folder {path}: give the folder that holds the images", path=path)
        found: dict[str, list[Path]] = {}
        for place, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files = [Path(place) / name for name in sorted(names) if _is_read(name)]
            inside = Path(place).relative_to(path).parts
            if files:
                found.setdefault(split_of(Path(inside[0])) if inside else ANY_SPLIT, []).extend(files)
        return NamedDataSet("imagefolder", not_empty(found, path, "images"))


def _is_read(name: str) -> bool:
    return name in TABLES or (not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES)
