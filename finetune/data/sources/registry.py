"""The registry of sources: every `Source` class in this package. To add one, add a file."""

from __future__ import annotations

from pathlib import Path

from finetune.core.registry import Registry
from finetune.data.sources.base import Opened, Source
from finetune.data.sources.photo_folder import PhotoFolder

SOURCES: Registry[Source] = Registry(Source, "finetune.data.sources", lambda item: item.name)


def open_source(path: Path) -> Opened:
    """Opens what `data.photos` names as a folder.

    Every other source that matches the path has precedence over a plain folder.

    Raises:
        BadInput: as `Source.open`.
    """
    others = [kind for kind in SOURCES.values() if kind is not PhotoFolder]
    kind = next((kind for kind in others if kind.matches(path)), PhotoFolder)
    return kind().open(path)
