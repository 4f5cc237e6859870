"""Several captions a photo, drawn by share, and the orders of a caption's tags.

Mixing synthetic captions with the originals, half and half, was better than originals alone (arXiv:2403.03206 section
5.3). All draws depend on the seed and the caption only, so that a resumed run has the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import torch

from finetune.core.errors import BadInput
from finetune.core.reading import parse_json, read_utf8
from finetune.core.rng import generator
from finetune.data.captions import caption_files, with_trigger
from finetune.data.photos import Photo, shown

OWN, TEMPLATES = "own", "templates"
SHOWN = 5  # photos that a message names

Value = TypeVar("Value")
CaptionShares = list[tuple[str, float]]  # caption, share


def mix_captions(
    folder: Path, photos: Sequence[Photo], mix: Mapping[str, float], templates: Sequence[str]
) -> list[CaptionShares]:
    """The captions of each photo with their shares. The share of `templates` is split evenly among them.

    Args:
        mix: name of captions -> share (`data.caption_mix`).

    Raises:
        BadInput: no photo has captions of one of the names, or a photo has none at all; the message names it.
    """
    found = {name: _texts_of(name, folder, photos) for name in mix if name != TEMPLATES}
    for name, texts in found.items():
        if not texts:
            where = (
                "caption files"
                if name == OWN
                else f"PHOTO.{name}.txt beside a photo, or column {name} of metadata.jsonl"
            )
            raise BadInput(
                f"data.caption_mix names {name!r} but {folder} has no such captions ({where}): write them with "
                "`finetune data caption`, or leave the name out"
            )
    if TEMPLATES in mix and not templates:
        raise BadInput("data.caption_mix names 'templates' but data.templates is empty: give at least one template")
    parts = []
    for photo in photos:
        own = [(texts[photo.path.name], mix[name]) for name, texts in found.items() if photo.path.name in texts]
        own += [(text, mix[TEMPLATES] / len(templates)) for text in templates if TEMPLATES in mix]
        parts.append(own)
    missing = [photo.path.name for photo, own in zip(photos, parts, strict=True) if not own]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise BadInput(
            f"{', '.join(map(shown, missing[:SHOWN]))}{more} of {folder} have no caption of data.caption_mix "
            f"({', '.join(mix)}): add one, or the name 'templates'"
        )
    return parts


def mix_files(folder: Path, photos: Sequence[Photo], mix: Mapping[str, float]) -> set[Path]:
    """The files PHOTO.NAME.txt that `mix_captions` reads."""
    names = [name for name in mix if name not in (OWN, TEMPLATES)]
    beside = (folder / f"{photo.path.stem}.{name}.txt" for photo in photos for name in names)
    return {file for file in beside if file.is_file()}


def _texts_of(name: str, folder: Path, photos: Sequence[Photo]) -> dict[str, str]:
    """File name -> caption. A file beside a photo wins over the column."""
    if name == OWN:
        return caption_files(folder, photos)
    found = _column(folder / "metadata.jsonl", name)
    for photo in photos:
        file = folder / f"{photo.path.stem}.{name}.txt"
        if file.is_file():
            found[photo.path.name] = " ".join(read_utf8(file).split())
    names = {photo.path.name for photo in photos}
    return {photo: text for photo, text in found.items() if text and photo in names}


def _column(file: Path, name: str) -> dict[str, str]:
    if not file.is_file():
        return {}
    rows = [parse_json(line, str(file), dict) for line in read_utf8(file).splitlines() if line.strip()]
    return {str(row.get("file_name")): " ".join(row[name].split()) for row in rows if isinstance(row.get(name), str)}


def tag_count(text: str) -> int:
    """The number of a caption's comma-separated tags."""
    return sum(bool(tag.strip()) for tag in text.split(","))


def tag_orders(text: str, keep: int, count: int, seed: int, trigger: str = "") -> list[str]:
    """Returns `count` drawn orders of a caption's tags behind the first `keep`; the caption itself if it has only one.

    A `trigger` at the end of the caption stays there. The same caption and seed give the same orders.
    """
    ends = bool(trigger) and text.endswith(trigger)
    body = text[: -len(trigger)] if ends else text
    tags = [tag for tag in (tag.strip() for tag in body.split(",")) if tag]
    first, rest = tags[:keep], tags[keep:]
    if len(rest) < 2:
        return [text]
    drawn = generator(seed, f"tags:{text}")
    orders = [torch.randperm(len(rest), generator=drawn).tolist() for _ in range(count)]
    bodies = [", ".join([*first, *(rest[number] for number in order)]) for order in orders]
    return [with_trigger(each, trigger) if ends else each for each in bodies]


def by_pattern(patterns: Mapping[str, Value], names: Sequence[str], default: Value, key: str) -> list[Value]:
    """The value of each name: of the first pattern that fits it, or the default.

    Raises:
        BadInput: a pattern fits no name.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadInput(
                f"{key} has {pattern!r}, which fits no photo ({', '.join(map(shown, names[:SHOWN]))}, ...): correct "
                "it, or leave it out"
            )
    fitting = (next((each for each in patterns if fnmatchcase(name, each)), None) for name in names)
    return [default if pattern is None else patterns[pattern] for pattern in fitting]
