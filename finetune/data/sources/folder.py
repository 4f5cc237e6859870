"""A folder of photos, used in place."""

from __future__ import annotations

from pathlib import Path

from finetune.data.sources.base import Opened, Source


class PhotoFolder(Source):
    name = "folder"

    @classmethod
    def matches(cls, path: Path) -> bool:
        return path.is_dir()

    def open(self, path: Path) -> Opened:
        return Opened(path)
