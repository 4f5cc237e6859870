"""Captions of photos, from files beside them or from templates with the token and the class noun."""

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
    """A photo with its possible captions (each step draws one of them), and where they come from."""

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
    """Finds the captions of every photo, in the order of `photos`. {token} and {noun} are filled in.

    `captions` says what to use: caption files, templates, or ("auto") files where they exist and templates elsewhere.

    Raises:
        BadInput: `captions` is "files" and photos have none (the message names them all), a template or noun is
            missing, or a caption names a photo that is not there.
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
    """Refuses captions without a photo: the name is misspelt, or the photo was not copied."""
    orphans = sorted(name for name in found if not (folder / name).exists())
    if orphans:
        raise BadInput(
            f"metadata.jsonl or captions.csv in {folder} names {', '.join(orphans)}, which is not there: remove the "
            "line, or add the photo",
            path=folder,
        )


def summarise(captioned: Sequence[Captioned], token: str) -> str:
    """Returns a sentence about where the captions come from, with a warning for files without the token."""
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
    """Returns a caption with {token} and {noun} filled in.

    Raises:
        BadInput: the text uses {noun} but there is no class noun.
    """
    if "{noun}" in text and not noun:
        raise BadInput(f"the caption {text!r} uses {{noun}} but there is no class noun: set data.class_noun=NOUN")
    return text.replace("{token}", token).replace("{noun}", noun or "")


def caption_files(folder: Path, photos: Sequence[Photo]) -> dict[str, str]:
    """Returns file name -> caption, from metadata.jsonl, captions.csv and .txt files beside the photos.

    If several name a photo, the last of these wins. Empty captions are left out.

    Raises:
        BadInput: a caption file can't be read.
    """
    found = caption_rows(folder)
    for photo in photos:
        file = photo.path.with_suffix(".txt")
        if file.is_file():
            found[photo.path.name] = " ".join(read_utf8(file).split())
    return {name: text for name, text in found.items() if text}


def caption_rows(folder: Path) -> dict[str, str]:
    """Returns file name -> caption, from metadata.jsonl and captions.csv; if both name a photo, captions.csv wins.

    Raises:
        BadInput: a caption file can't be read.
    """
    return {**_jsonl(folder / "metadata.jsonl"), **_csv(folder / "captions.csv")}


def _jsonl(file: Path) -> dict[str, str]:
    """Reads the hub's imagefolder layout: one {"file_name": ..., "text": ...} in each line."""
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
    """Reads two columns, file name and caption. The first line may be the header file_name,text."""
    if not file.is_file():
        return {}
    try:
        rows = [row for row in csv.reader(io.StringIO(read_utf8(file))) if row]
    except csv.Error as error:  # a field of more than 131,072 characters
        raise BadInput(f"{file} can't be read ({error}): correct it") from error
    if any(len(row) != 2 for row in rows):
        raise BadInput(
            f"{file} must have two columns, file name and caption: put captions with commas in quotes", path=file
        )
    return {name.strip(): text.strip() for name, text in rows if name != "file_name"}
