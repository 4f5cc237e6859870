"""Captions of photos: files beside them, or templates of token and class noun."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.data.photos import Photo
from finetune.errors import BadInput


@dataclass(frozen=True)
class Captioned:
    """A photo's possible captions (one is drawn per step), and where they come from."""

    photo: Photo
    captions: list[str]
    source: Literal["file", "template"]


def caption_photos(
    photos: Sequence[Photo],
    *,
    captions: Literal["auto", "files", "templates"],
    templates: Sequence[str],
    token: str,
    noun: str | None,
) -> list[Captioned]:
    """Captions every photo; {token} and {noun} are filled in, in files and templates alike.

    Raises:
        BadInput: `captions` is "files" and some photo has none (all are named); no template; no noun for {noun}.
    """
    found = {} if captions == "templates" else caption_files(photos[0].path.parent, photos)
    missing = [photo.path.name for photo in photos if photo.path.name not in found]
    if captions == "files" and missing:
        raise BadInput(f"no caption was found for {', '.join(missing)}: add a .txt beside each, or set data.captions=auto")
    if missing and not templates:
        raise BadInput("data.templates is empty but some photos have no caption file: give at least one template")
    return [_captioned(photo, found.get(photo.path.name), templates, token, noun) for photo in photos]


def _captioned(photo: Photo, text: str | None, templates: Sequence[str], token: str, noun: str | None) -> Captioned:
    if text is not None:
        return Captioned(photo, [fill(text, token, noun)], "file")
    return Captioned(photo, [fill(template, token, noun) for template in templates], "template")


def fill(text: str, token: str, noun: str | None) -> str:
    if "{noun}" in text and not noun:
        raise BadInput(f"the caption {text!r} uses {{noun}} but there is no class noun: set data.class_noun=NOUN")
    return text.replace("{token}", token).replace("{noun}", noun or "")


def caption_files(folder: Path, photos: Sequence[Photo]) -> dict[str, str]:
    """File name -> caption, from metadata.jsonl, captions.csv and .txt files beside the photos (the last one wins)."""
    found = {**_jsonl(folder / "metadata.jsonl"), **_csv(folder / "captions.csv")}
    for photo in photos:
        beside = photo.path.with_suffix(".txt")
        if beside.is_file():
            found[photo.path.name] = " ".join(beside.read_text(encoding="utf-8").split())
    return {name: text for name, text in found.items() if text}


def _jsonl(file: Path) -> dict[str, str]:
    """The hub's imagefolder layout: one {"file_name": ..., "text": ...} a line."""
    if not file.is_file():
        return {}
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found[str(row["file_name"])] = str(row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f'{file} line {number} is not {{"file_name": ..., "text": ...}}: mend it') from error
    return found


def _csv(file: Path) -> dict[str, str]:
    """Two columns: file name, caption; a header line file_name,text may stand first."""
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8", newline="") as opened:
        rows = [row for row in csv.reader(opened) if row]
    if any(len(row) != 2 for row in rows):
        raise BadInput(f"{file} must have two columns, file name and caption: put captions with commas in quotes")
    return {name.strip(): text.strip() for name, text in rows if name != "file_name"}
