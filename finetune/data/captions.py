"""Captions of photos, from files beside them or from templates with the token and the class noun."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from finetune.core.errors import BadInput
from finetune.core.reading import parse_json, read_utf8
from finetune.data.decoding import shown
from finetune.data.photos import Photo

BESIDE = (".txt", ".caption")  # a photo's own caption, in any case: NAME.txt, NAME.caption
NAMED = 5  # files that a warning names; the rest is counted
LISTS = ("metadata.jsonl", "metadata.csv", "captions.csv")  # captions of a whole folder
COLUMNS = ("text", "caption", "prompt")  # where metadata has the caption; the first that is there


@dataclass(frozen=True)
class Captioned:
    """A photo with its possible captions (each step draws one of them), and where they come from.

    `plain` holds each caption without the trigger's words, or None where they can't be told from the rest. `added`:
    whether the trigger was added to a caption that had no token. `shares`: how often each caption is drawn, relative
    to the others; empty if all are drawn equally often.
    """

    photo: Photo
    captions: list[str]
    source: Literal["file", "template"]
    plain: tuple[str | None, ...] = ()
    added: bool = False
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Words:
    """What {token} and {noun} become, and `trigger`: words with {token} for captions that lack it, or empty."""

    token: str
    noun: str | None
    trigger: str = ""

    def fill(self, text: str) -> str:
        """Returns a text with {token} and {noun} filled in.

        Raises:
            BadInput: the text uses {noun} but there is no class noun.
        """
        return fill(text, self.token, self.noun)

    def has_token(self, text: str) -> bool:
        """Whether the token is in a text as a word of its own."""
        return _as_words(self.token).search(text) is not None

    def names_token(self, text: str) -> bool:
        """Whether the token is in a text in any case: CLIP's tokenizers make sks of SKS."""
        return _as_words(self.token.lower()).search(text.lower()) is not None


def caption_photos(
    photos: Sequence[Photo],
    *,
    captions: Literal["auto", "files", "templates"],
    templates: Sequence[str],
    words: Words,
) -> list[Captioned]:
    """Finds the captions of every photo, in the order of `photos`. {token} and {noun} are filled in.

    `captions` says what to use: caption files, templates, or ("auto") files where they exist and templates elsewhere.
    The trigger is added to every caption without the token.

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
    texts = ([found[photo.path.name]] if photo.path.name in found else [] for photo in photos)
    return [_captioned(photo, own, templates, words) for photo, own in zip(photos, texts, strict=True)]


def caption_rows_of(
    photos: Sequence[Photo],
    texts: Sequence[list[str]],
    *,
    captions: Literal["auto", "files", "templates"],
    templates: Sequence[str],
    words: Words,
) -> list[Captioned]:
    """As `caption_photos`, with the captions of each photo as its data set has them; a row may have none.

    Raises:
        BadInput: `captions` is "files" and rows have none, or a template or noun is missing.
    """
    found = [[]] * len(photos) if captions == "templates" else texts
    missing = [photo.path.name for photo, own in zip(photos, found, strict=True) if not own]
    if captions == "files" and missing:
        raise BadInput(
            f"data.captions is 'files' but {_some(missing)} of {photos[0].path.parent} have no caption: set "
            "data.captions=auto, which takes data.templates for them, or name another data.caption_column"
        )
    if missing and not templates:
        raise BadInput("data.templates is empty but some rows have no caption: give at least one template")
    return [_captioned(photo, own, templates, words) for photo, own in zip(photos, found, strict=True)]


def caption_mixed(
    photos: Sequence[Photo], parts: Sequence[Sequence[tuple[str, float]]], words: Words
) -> list[Captioned]:
    """As `caption_photos`, with (caption, share) of each photo; at least one each."""
    mixed = []
    for photo, own in zip(photos, parts, strict=True):
        made = _captioned(photo, [text for text, _ in own], [], words)
        mixed.append(replace(made, shares=tuple(share for _, share in own)))
    return mixed


def _refuse_orphans(folder: Path, found: dict[str, str]) -> None:
    """Refuses captions without a photo: the name is misspelt, or the photo was not copied."""
    orphans = sorted(name for name in found if not (folder / name).exists())
    if orphans:
        lists = " or ".join(file.name for file in _lists(folder))
        raise BadInput(
            f"{lists} in {folder} names {', '.join(orphans)}, which is not there: remove the line, or add the photo",
            path=folder,
        )


def summarise(captioned: Sequence[Captioned], words: Words) -> str:
    """Returns a sentence about where the captions come from, with a warning for captions without the token."""
    by_file = [item for item in captioned if item.source == "file"]
    summary = (
        f"{len(by_file)} of {len(captioned)} photos captioned by files, {len(captioned) - len(by_file)} by templates"
    )
    added = sum(item.added for item in captioned)
    if added:
        summary += f"; {words.fill(words.trigger)!r} is added to the captions of {added}, which have no token"
    without = [item.photo.path.name for item in by_file if not any(map(words.has_token, item.captions))]
    if without:
        summary += (
            f"; WARNING: the token {words.token!r} is not in the caption of {_some(without)}, so it learns nothing "
            "from them, and what they show becomes part of every prompt: write {token} into the caption files, or set "
            "data.trigger to words that are added to them, such as data.trigger='in {token} style'"
        )
    return summary + _without_token(captioned, words) + _without_trigger(captioned, words)


def _without_trigger(captioned: Sequence[Captioned], words: Words) -> str:
    """A warning of a trigger that is in no caption: the run would learn nothing by it."""
    trigger = words.fill(words.trigger).strip(" ,;:")
    if not trigger or any(trigger in text for item in captioned for text in item.captions):
        return ""
    return (
        f"; WARNING: data.trigger adds {trigger!r} to no caption, since all have the token already: leave {{token}} "
        "out of data.templates and of the caption files"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _without_token(captioned: Sequence[Captioned], words: Words) -> str:
    """A warning of templates that say nothing of the token."""
    texts = dict.fromkeys(text for item in captioned if item.source == "template" for text in item.captions)
    without = [repr(text) for text in texts if not words.has_token(text)]
    return f"; WARNING: no token in {', '.join(without)}: write {{token}} into data.templates" if without else ""


def _captioned(photo: Photo, texts: Sequence[str], templates: Sequence[str], words: Words) -> Captioned:
    source: Literal["file", "template"] = "file" if texts else "template"
    filled = [words.fill(each) for each in texts or templates]
    if not words.trigger:
        return Captioned(photo, filled, source)
    trigger = words.fill(words.trigger)
    captions = [each if words.has_token(each) else with_trigger(each, trigger) for each in filled]
    plain = [without_trigger(each, trigger) for each in captions]
    known = tuple(None if each is None or words.names_token(each) else each for each in plain)
    return Captioned(photo, captions, source, known, captions != filled)


def with_trigger(text: str, trigger: str) -> str:
    """Returns a caption with the trigger's words at its end: "a house" -> "a house in zwx style"."""
    joint = "" if trigger[:1] in (",", ";", ":") else " "
    return f"{text.rstrip(' .,;:')}{joint}{trigger}".strip()


def without_trigger(text: str, trigger: str, any_case: bool = False) -> str | None:
    """Returns a caption without the trigger's words, as it would be without the style; None if they are not in it.

    `any_case`: as text encoders read them, which make zwx of ZWX.
    """
    words = _as_words(trigger, re.IGNORECASE if any_case else 0)
    if not words.search(text):
        return None
    return " ".join(words.sub(" ", text).split()).strip(" ,;:")


def _as_words(text: str, flags: int = 0) -> re.Pattern[str]:
    """Finds a text, but not inside of longer words: "sks" is not in "two desks"."""
    begin, end = (r"(?<!\w)" if re.match(r"\w", text) else "", r"(?!\w)" if re.search(r"\w$", text) else "")
    return re.compile(f"{begin}{re.escape(text)}{end}", flags)


def fill(text: str, token: str, noun: str | None) -> str:
    """Returns a caption with {token} and {noun} filled in.

    Raises:
        BadInput: the text uses {noun} but there is no class noun.
    """
    if "{noun}" in text and not noun:
        raise BadInput(f"the caption {text!r} uses {{noun}} but there is no class noun: set data.class_noun=NOUN")
    return text.replace("{token}", token).replace("{noun}", noun or "")


def caption_files(folder: Path, photos: Sequence[Photo]) -> dict[str, str]:
    """Returns file name -> caption, from the folder's lists, or from files beside the photos, which win.

    Empty captions are left out.

    Raises:
        BadInput: a file can't be read, or two say different things of one photo.
    """
    found = caption_rows(folder)
    beside = captions_beside(folder, photos)
    for photo in photos:
        if photo.path.stem in beside:
            found[photo.path.name] = _own_caption(photo, beside[photo.path.stem])
    return {name: text for name, text in found.items() if text}


def caption_sources(folder: Path, photos: Sequence[Photo]) -> set[Path]:
    """The files that `caption_files` reads."""
    return {file for files in captions_beside(folder, photos).values() for file in files} | set(_lists(folder))


def captions_beside(folder: Path, photos: Sequence[Photo]) -> dict[str, list[Path]]:
    """A photo's name without suffix -> its caption files, sorted."""
    stems = {photo.path.stem for photo in photos}
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in BESIDE and file.stem in stems and file.is_file():
            found.setdefault(file.stem, []).append(file)
    return found


def _own_caption(photo: Photo, files: Sequence[Path]) -> str:
    texts = {file.name: text for file in files if (text := " ".join(read_utf8(file).split()))}
    if len(set(texts.values())) > 1:
        raise BadInput(
            f"{photo.path.name} has different captions in {' and '.join(map(shown, texts))}: keep one of these files",
            path=photo.path,
        )
    return next(iter(texts.values()), "")


def caption_rows(folder: Path) -> dict[str, str]:
    """File name -> caption, from the folder's metadata.jsonl, metadata.csv and captions.csv (which wins over the
    first).

    Raises:
        BadInput: a list can't be read, or metadata.csv says something else than another one.
    """
    others = {**_jsonl(folder / "metadata.jsonl"), **_csv(folder / "captions.csv")}
    found = _metadata_csv(folder / "metadata.csv")
    for name in sorted(found.keys() & others.keys()):
        if found[name] and others[name] and found[name] != others[name]:
            lists = " and ".join(file.name for file in _lists(folder))
            raise BadInput(
                f"{shown(name)} has different captions in {lists} of {folder}: keep one of these files", path=folder
            )
    return {name: others.get(name) or text for name, text in {**others, **found}.items()}


def _lists(folder: Path) -> list[Path]:
    return [folder / name for name in LISTS if (folder / name).is_file()]


def _jsonl(file: Path) -> dict[str, str]:
    """Reads the hub's imagefolder layout: one {"file_name": ..., "text": ...} in each line."""
    if not file.is_file():
        return {}
    found: list[tuple[str, str]] = []
    # not splitlines: JSON may hold other line ends, such as U+2028, inside of a text
    for number, line in enumerate(read_utf8(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"{file} line {number}", dict)
            name, text = str(row["file_name"]), row[caption_key(row)]
        except (BadInput, KeyError) as error:
            raise BadInput(
                f'{file} line {number} is not {{"file_name": ..., "text": ...}}: correct it', path=file
            ) from error
        if isinstance(text, list | dict):
            kind = "a list" if isinstance(text, list) else "an object"
            raise BadInput(f"{file} line {number} has {kind} as its caption: give one text", path=file)
        found.append((name, "" if text is None else str(text)))
    return _by_name(file, found)


def caption_key(columns: Iterable[str]) -> str:
    """Which column of a list has the captions: the first of `COLUMNS` that is there."""
    there = set(columns)
    return next((key for key in COLUMNS if key in there), COLUMNS[0])


def further_columns(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> the columns besides file name and caption of metadata.jsonl, or else of metadata.csv (as text).

    What the lists say was checked before, by `caption_rows`.
    """
    file = folder / "metadata.jsonl"
    rows = _table_rows(folder / "metadata.csv")
    if file.is_file():
        lines = (line for line in read_utf8(file).split("\n") if line.strip())
        rows += [parse_json(line, str(file), dict) for line in lines]
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        others = {key: value for key, value in row.items() if key not in ("file_name", caption_key(row))}
        found.setdefault(str(row.get("file_name")), {}).update(others)
    return found


def _table_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of metadata.csv; empty cells are left out, except that of the caption."""
    rows = _csv_rows(file)
    header = [name.strip() for name in rows[0]] if rows else []
    kept = ("file_name", caption_key(header))
    told = [dict(zip(header, (cell.strip() for cell in row), strict=False)) for row in rows[1:]]
    return [{name: cell for name, cell in row.items() if name and (cell or name in kept)} for row in told]


def _by_name(file: Path, rows: Iterable[tuple[str, str]]) -> dict[str, str]:
    """File name -> caption. The same row twice counts once.

    Raises:
        BadInput: a photo has two different captions.
    """
    found: dict[str, str] = {}
    for name, text in rows:
        if found.setdefault(name, text) != text:
            raise BadInput(f"{file} has two different captions for {shown(name)}: keep one of these lines", path=file)
    return found


def _csv(file: Path) -> dict[str, str]:
    """Reads two columns, file name and caption. The first line may be the header file_name,text."""
    rows = _csv_rows(file)
    if any(len(row) != 2 for row in rows):
        raise BadInput(
            f"{file} must have two columns, file name and caption: put captions with commas in quotes", path=file
        )
    return _by_name(file, ((name.strip(), text.strip()) for name, text in rows if name != "file_name"))


def _metadata_csv(file: Path) -> dict[str, str]:
    """A header line with file_name and one of COLUMNS, as image folders of `datasets` have it, then a line a photo."""
    rows = _csv_rows(file)
    if not rows:
        return {}
    header = [name.strip() for name in rows[0]]
    column = next((header.index(name) for name in COLUMNS if name in header), None)
    if column is None or "file_name" not in header:
        raise BadInput(
            f"{file} must begin with a line that names its columns, such as file_name,text: add that line", path=file
        )
    wrong = [number for number, row in enumerate(rows[1:], 2) if len(row) != len(header)]
    if wrong:
        raise BadInput(
            f"row {wrong[0]} of {file} has not the {len(header)} columns of its first line: put captions with commas "
            "in quotes",
            path=file,
        )
    name = header.index("file_name")
    return _by_name(file, ((row[name].strip(), row[column].strip()) for row in rows[1:]))


def _csv_rows(file: Path) -> list[list[str]]:
    """Nothing where there is no such file; empty lines are left out."""
    if not file.is_file():
        return []
    try:
        return [row for row in csv.reader(io.StringIO(read_utf8(file))) if row]
    except csv.Error as error:  # a field of more than 131,072 characters
        raise BadInput(f"{file} can't be read ({error}): correct it") from error
