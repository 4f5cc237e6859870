"""Captions of photos: files beside them, or templates of token and class noun."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.core.errors import BadInput
from finetune.core.reading import parse_json, read_utf8
from finetune.data.photos import Photo


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
    _refuse_orphans(photos[0].path.parent, found)
    missing = [photo.path.name for photo in photos if photo.path.name not in found]
    if captions == "files" and missing:
        raise BadInput(
            f"no caption was found for {', '.join(missing)}: add a .txt beside each, or set data.captions=auto"
        )
    if missing and not templates:
        raise BadInput("data.templates is empty but some photos have no caption file: give at least one template")
    return [_captioned(photo, found.get(photo.path.name), templates, token, noun) for photo in photos]


def _refuse_orphans(folder: Path, found: dict[str, str]) -> None:
    """A caption without its photo is a misspelt name, or a photo that was not copied."""
    orphans = sorted(name for name in found if not (folder / name).exists())
    if orphans:
        raise BadInput(
            f"metadata.jsonl or captions.csv in {folder} names {', '.join(orphans)}, which is not there: remove the "
            "line, or add the photo",
            path=folder,
        )


def summarise(captioned: Sequence[Captioned], token: str) -> str:
    """Where the captions come from, in a sentence, with a warning for caption files that do not name the token."""
    by_file = [item for item in captioned if item.source == "file"]
    summary = (
        f"{len(by_file)} of {len(captioned)} photos captioned by files, {len(captioned) - len(by_file)} by templates"
    )
    word = re.compile(rf"(?<!\w){re.escape(token)}(?!\w)")
    without = [item.photo.path.name for item in by_file if not any(word.search(text) for text in item.captions)]
    if without:
        summary += (
            f"; WARNING: the token {token!r} is not in the caption of {', '.join(without)}, so it learns nothing from "
            "them: write {token} into the caption files"
        )
    return summary


def _captioned(photo: Photo, text: str | None, templates: Sequence[str], token: str, noun: str | None) -> Captioned:
    if text is not None:
        return Captioned(photo, [fill(text, token, noun)], "file")
    return Captioned(photo, [fill(template, token, noun) for template in templates], "template")


def fill(text: str, token: str, noun: str | None) -> str:
    if "{noun}" in text and not noun:
        raise BadInput(f"the caption {text!r} uses {{noun}} but there is no class noun: set data.class_noun=NOUN")
    return text.replace("{token}", token).replace("{noun}", noun or "")


def caption_files(folder: Path, photos: Sequence[Photo]) -> dict[str, str]:
    """File name -> caption, from metadata.jsonl, captions.csv and .txt files beside the photos (the last one wins).

    An empty caption counts as none.
    """
    found = caption_rows(folder)
    for photo in photos:
        file = photo.path.with_suffix(".txt")
        if file.is_file():
            found[photo.path.name] = " ".join(read_utf8(file).split())
    return {name: text for name, text in found.items() if text}


def caption_rows(folder: Path) -> dict[str, str]:
    """File name -> caption, from the folder's metadata.jsonl and captions.csv (which wins)."""
    return {**_jsonl(folder / "metadata.jsonl"), **_csv(folder / "captions.csv")}


def _jsonl(file: Path) -> dict[str, str]:
    """The hub's imagefolder layout: one {"file_name": ..., "text": ...} a line."""
    if not file.is_file():
        return {}
    found = {}
    for number, line in enumerate(read_utf8(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"{file} line {number}", dict)
            found[str(row["file_name"])] = str(row["text"])
        except (BadInput, KeyError) as error:
            raise BadInput(
                f'{file} line {number} is not {{"file_name": ..., "text": ...}}: correct it', path=file
            ) from error
    return found


def _csv(file: Path) -> dict[str, str]:
    """Two columns: file name, caption; a header line file_name,text may stand first."""
    if not file.is_file():
        return {}
    try:
        rows = [row for row in csv.reader(io.StringIO(read_utf8(file))) if row]
    except csv.Error as error:  # a field of more than 131,072 characters
        raise BadInput(f"{file} can't be read ({error}): mend it") from error
    if any(len(row) != 2 for row in rows):
        raise BadInput(
            f"{file} must have two columns, file name and caption: put captions with commas in quotes", path=file
        )
    return {name.strip(): text.strip() for name, text in rows if name != "file_name"}
