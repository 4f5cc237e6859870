"""Sources. Every module here that defines a `Source` is one: a new source is one new file."""

from __future__ import annotations

from pathlib import Path

from finetune.core.registry import Registry
from finetune.data.sources.base import Opened, Source
from finetune.data.sources.folder import PhotoFolder

SOURCES: Registry[Source] = Registry(Source, "finetune.data.sources", lambda item: item.name)


def open_source(path: Path) -> Opened:
    """What `data.photos` names, as a folder. A folder that a source knows better than as a folder is that source's.

    Raises:
        BadInput: as `Source.open`.
    """
    others = [kind for kind in SOURCES.values() if kind is not PhotoFolder]
    kind = next((kind for kind in others if kind.matches(path)), PhotoFolder)
    return kind().open(path)
