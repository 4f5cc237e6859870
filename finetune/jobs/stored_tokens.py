"""The rare tokens of a base, searched once: a search asks text encoders and denoiser more than a hundred times.

What is found depends on the base's files (its hash is that of tokenizers, encoders and weights), on the precision and
kind of device that it computes in, on the class noun and on our lists of words. All of that is in the name of the
stored file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from finetune import __version__
from finetune.core.errors import BadInput
from finetune.core.files import cache_dir, write_json
from finetune.core.reading import read_json
from finetune.data import meanings, tokens
from finetune.families.base import Family
from finetune.families.digests import base_hash
from finetune.training.peers import joined

VERSION = 1  # of what a search does, beside the version of the package


def suggested(family: Family, count: int, noun: str | None) -> list[str]:
    """The texts of `tokens.suggest`, read from the cache if they were found before. A damaged file is made again. Of
    several processes the first one writes it.

    Args:
        family: an unchanged base.

    Raises:
        BadInput: as `tokens.suggest`.
        OSError: the file can't be written.
    """
    file = _file(family, count, noun)
    stored = _read(file)
    if stored is not None:
        return stored
    found = [token.text for token in tokens.suggest(family, count, noun)]
    if joined().rank == 0:
        write_json(file, {"tokens": found})
    return found


def _file(family: Family, count: int, noun: str | None) -> Path:
    dtypes = [str(family.parts.dtype(part)) for part in family.parts]
    lists = [meanings.known(), meanings.pieces()]
    made_of = (VERSION, __version__, base_hash(family.folder), family.inputs, family.device.type, dtypes)
    name = hashlib.sha256(repr((*made_of, lists, noun, count)).encode()).hexdigest()
    return cache_dir() / "tokens" / f"{name}.json"


def _read(file: Path) -> list[str] | None:
    try:
        found = read_json(file, dict).get("tokens") if file.is_file() else None
    except BadInput:
        return None
    sound = isinstance(found, list) and bool(found) and all(isinstance(text, str) and text for text in found)
    return found if sound else None
