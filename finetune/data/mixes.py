"""Several captions a photo, drawn by share, and the orders of a caption's tags.

Mixing synthetic captions with the originals, half and half, was better than originals alone (arXiv:2403.03206 section
5.3). All draws depend on the seed and the caption only, so that a resumed run has the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch

from finetune.core.errors import BadInput
from finetune.core.reading import read_utf8
from finetune.core.rng import generator
from finetune.data.captions import caption_files, further_columns, with_trigger
from finetune.data.decoding import shown
from finetune.data.photos import Photo

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
    columns = further_columns(folder) if set(mix) - {OWN, TEMPLATES} else {}
    found = {name: _texts_of(name, folder, photos, columns) for name in mix if name != TEMPLATES}
    for name, texts in found.items():
        if not texts:
            where = (
                "caption files"
                if name == OWN
                else f"PHOTO.{name}.txt beside a photo, or column {name} of metadata.jsonl or .csv"
            )
            raise BadInput(
                f"data.caption_mix names {name!r} but {folder} has no such captions ({where}): write them with "
                "`finetune data caption`, or leave the name out"
            )
    names = [photo.path.name for photo in photos]
    held = {part: [[texts[name]] if name in texts else [] for name in names] for part, texts in found.items()}
    return mix_rows(str(folder), names, held, mix, templates)


def mix_rows(
    where: str,
    names: Sequence[str],
    held: Mapping[str, Sequence[Sequence[str]]],
    mix: Mapping[str, float],
    templates: Sequence[str],
) -> list[CaptionShares]:
    """As `mix_captions`, of captions that were read: `held` has those of each photo for each name of the mix.

    The share of a name is split evenly among a photo's captions of it.

    Raises:
        BadInput: no photo has captions of one of the names, or a photo has none at all; the message names it.
    """
    for part, texts in held.items():
        if not any(texts):
            raise BadInput(f"data.caption_mix names {part!r} but {where} has no such captions: leave the name out")
    if TEMPLATES in mix and not templates:
        raise BadInput("data.caption_mix names 'templates' but data.templates is empty: give at least one template")
    parts = []
    for number in range(len(names)):
        own = [(text, mix[part] / len(texts[number])) for part, texts in held.items() for text in texts[number]]
        own += [(text, mix[TEMPLATES] / len(templates)) for text in templates if TEMPLATES in mix]
        parts.append(own)
    missing = [name for name, own in zip(names, parts, strict=True) if not own]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise BadInput(
            f"{', '.join(map(shown, missing[:SHOWN]))}{more} of {where} have no caption of data.caption_mix "
            f"({', '.join(mix)}): add one, or the name 'templates'"
        )
    return parts


def mix_files(folder: Path, photos: Sequence[Photo], mix: Mapping[str, float]) -> set[Path]:
    """The files PHOTO.NAME.txt that `mix_captions` reads."""
    names = [name for name in mix if name not in (OWN, TEMPLATES)]
    beside = (folder / f"{photo.path.stem}.{name}.txt" for photo in photos for name in names)
    return {file for file in beside if file.is_file()}


def _texts_of(
    name: str, folder: Path, photos: Sequence[Photo], columns: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """File name -> caption. A file beside a photo wins over the column."""
    if name == OWN:
        return caption_files(folder, photos)
    found = {file: " ".join(row[name].split()) for file, row in columns.items() if isinstance(row.get(name), str)}
    for photo in photos:
        file = folder / f"{photo.path.stem}.{name}.txt"
        if file.is_file():
            found[photo.path.name] = " ".join(read_utf8(file).split())
    names = {photo.path.name for photo in photos}
    return {photo: text for photo, text in found.items() if text and photo in names}


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
