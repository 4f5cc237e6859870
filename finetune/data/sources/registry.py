"""The registry of sources: every `Source` class in this package. To add one, add a file."""

from __future__ import annotations

from pathlib import Path

from finetune.core.errors import BadInput
from finetune.core.registry import Registry
from finetune.data.sources.base import Opened, Source, SourceOptions
from finetune.data.sources.photo_folder import PhotoFolder

AUTO = "auto"
SOURCES: Registry[Source] = Registry(Source, "finetune.data.sources", lambda item: item.name)


def open_source(path: Path, kind: str = AUTO, options: SourceOptions = SourceOptions()) -> Opened:  # noqa: B008
    """Opens what `data.photos` names. `kind` is `data.source`: a name in `SOURCES`, or "auto".

    With "auto", every other source that matches the path has precedence over a plain folder.

    Raises:
        BadInput: there is no such kind; an option has no effect on it; and as `Source.open`.
    """
    if kind != AUTO and kind not in SOURCES:
        raise BadInput(f"data.source is {kind!r}: choose {AUTO}, {', '.join(SOURCES)}")
    others = [each for each in SOURCES.values() if each is not PhotoFolder]
    matching = next((each for each in others if each.matches(path)), PhotoFolder)
    chosen = matching if kind == AUTO else SOURCES[kind]
    return chosen(options).open(path)
