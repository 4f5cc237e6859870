"""Photos in a folder."""

from __future__ import annotations

from pathlib import Path

from finetune.data.sources.base import Opened, Source


class PhotoFolder(Source):
    """A folder of photos, used in place."""

    name = "folder"

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Returns whether the path is a folder."""
        return path.is_dir()

    def open(self, path: Path) -> Opened:
        """Returns the folder itself."""
        return Opened(path)
