"""Writes a data set of the hub, or a local one that `datasets` reads, as a folder of photos with captions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.endings import damage_of_bytes, ending_of
from data_tools.show import LEFT_OUT, SHOWN, add_run, say, say_json, whole_number
from data_tools.work import LIST, SCHEMA
from finetune import __version__
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.files import new_folder, sha256, write_json, write_text
from finetune.data.decoding import BadImage, opened
from finetune.data.leftovers import MANIFEST


@dataclass
class Unpacked:
    """What `unpack` did with each row: the file and its SHA-256, or why it was left out."""

    written: dict[str, tuple[str, str]]
    left_out: dict[str, str]


def unpack(source: str, out: Path, split: str, image: str, caption: str, limit: int | None) -> Unpacked:
    """Writes OUT/00000.png, ... (the stored bytes, not encoded again), OUT/metadata.jsonl and the manifest.

    Args:
        source: a hub id, an image folder, or a .parquet file.
        out: the new folder.
        split: the name of the data set's split.
        image: the column with the images.
        caption: the column with the captions; it may be missing.
        limit: the most images to write; None for all.

    Returns:
        What was written and what was left out: rows without an image, and those whose image can't be read to its end.

    Raises:
        BadInput: there is no such data set, split or column; no row has an image; or OUT already exists.
    """
    _refuse_place(out)
    rows = _rows(source, split, image, caption)
    lines, others = [], {}
    done = Unpacked({}, {})
    with new_folder(out) as temporary:
        for label, name, content, row in _images(rows, image, source, limit, done):
            (temporary / name).write_bytes(content)
            done.written[label] = (name, sha256(temporary / name))
            if row.get(caption):
                lines.append(json.dumps({"file_name": name, "text": row[caption]}, ensure_ascii=False) + "\n")
        _refuse_nothing(done, source, image)
        if lines:
            write_text(temporary / LIST, "".join(lines))
            others = {LIST: sha256(temporary / LIST)}
        settings = {"split": split, "image": image, "caption": caption, "limit": limit}
        write_json(temporary / MANIFEST, _manifest(source, settings, done, others))
    return done


def _images(
    rows: Any, image: str, source: str, limit: int | None, done: Unpacked
) -> Iterator[tuple[str, str, bytes, dict[str, Any]]]:
    """Label, name, bytes and columns of each row with a whole image. The others are noted in `done`."""
    chosen = _chosen(rows, limit)
    with phase("Reading", len(chosen), "photos") as advance:
        for number, row in enumerate(chosen):
            label = f"row {number}"
            content = _stored(row[image], source)
            ending, fault = _form_of(Path(label), content)
            if fault:
                done.left_out[label] = fault
            else:
                yield label, f"{number:05d}.{ending}", content, row
            advance(1, "")


def _form_of(name: Path, content: bytes) -> tuple[str, str]:
    """The ending that fits an image's bytes, and why they can't be used, or empty."""
    if not content:
        return "", "no image"
    try:
        with opened(name, content) as image:
            ending = ending_of(image)
    except BadImage as fault:
        return "", fault.reason
    return ending, damage_of_bytes(name, content, ending)


def _refuse_nothing(done: Unpacked, source: str, image: str) -> None:
    if not done.written:
        first = next(iter(done.left_out.items()), ("row 0", "no image"))
        raise BadInput(f"no row of {source!r} has an image in the column {image!r} ({first[0]}: {first[1]})")


def _chosen(rows: Any, limit: int | None) -> Any:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _manifest(source: str, settings: dict[str, Any], done: Unpacked, others: dict[str, str]) -> dict[str, Any]:
    """As `data_tools.work` writes it."""
    photos: list[dict[str, Any]] = [
        {"source": row, "sha256": digest, "action": "written", "why": "", "files": {name: digest}}
        for row, (name, digest) in done.written.items()
    ]
    photos += [
        {"source": row, "sha256": "", "action": LEFT_OUT, "why": why, "files": {}}
        for row, why in done.left_out.items()
    ]
    return {
        "schema": SCHEMA, "finetune": __version__, "command": "unpack", "settings": settings, "source": source,
        "notes": [], "photos": photos, "files": others,
    }  # fmt: skip


def _refuse_place(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise BadInput(f"{out} already exists: give another folder, or remove it")


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `unpack`."""
    parser.add_argument("source", metavar="DATASET", help="a hub id, an image folder or a .parquet file")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image", default="image", help="the column that holds the images")
    parser.add_argument("--caption", default="text", help="the column that holds the captions, if there is one")
    parser.add_argument("--limit", type=whole_number(1, "images"), help="write at most this many images")
    add_run(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    asked = (options.split, options.image, options.caption)
    done = _looked(options) if options.dry_run else unpack(options.source, options.out, *asked, options.limit)
    count = len(done.written)
    if options.json:
        about = {"command": "unpack", "out": str(options.out), "dry_run": options.dry_run, "images": count}
        say_json(about | {"left_out": done.left_out})
        return 0
    for row, why in list(done.left_out.items())[:SHOWN]:
        say(f"{row}: {LEFT_OUT} ({why})")
    if len(done.left_out) > SHOWN:
        say(f"... and {len(done.left_out) - SHOWN} more")
    if options.dry_run:
        say(f"nothing was written (--dry-run): {options.out} would hold {count} images")
        return 0
    say(f"{count} images in {options.out}; check them with: python -m data_tools check {options.out}")
    return 0


def _looked(options: argparse.Namespace) -> Unpacked:
    """What would be unpacked."""
    _refuse_place(options.out)
    rows = _rows(options.source, options.split, options.image, options.caption)
    done = Unpacked({}, {})
    for label, name, _, _ in _images(rows, options.image, options.source, options.limit, done):
        done.written[label] = (name, "")
    _refuse_nothing(done, options.source, options.image)
    return done


def _rows(source: str, split: str, image: str, caption: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    folder = Path(source).expanduser()
    try:
        if folder.suffix == ".parquet" and folder.is_file():
            rows = datasets.load_dataset("parquet", data_files=str(folder), split=split)
        elif folder.is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split=split)
        else:
            rows = datasets.load_dataset(source, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(
            f"the data set {source!r} could not be loaded ({reason}): check its name and --split"
        ) from error
    columns = rows.column_names
    if image not in columns:
        raise BadInput(f"{source!r} has no column {image!r} (it has {', '.join(columns)}): name one with --image")
    if not len(rows):
        raise BadInput(f"{source!r} has no rows in the split {split!r}: choose another with --split")
    return rows.cast_column(image, datasets.Image(decode=False))


def _stored(image: dict[str, Any] | None, source: str) -> bytes:
    """An image's bytes, from the data set or from one of its files; none for a row without an image.

    A data set can name any file on this disk, so a file outside the data set's folder is refused with BadInput.
    """
    import datasets

    if image is None or (image["bytes"] is None and image["path"] is None):
        return b""
    if image["bytes"] is not None:
        content: bytes = image["bytes"]
        return content
    file, folder = Path(image["path"]).resolve(), Path(source).expanduser()
    home = folder if folder.is_dir() else folder.parent if folder.exists() else Path(datasets.config.HF_CACHE_HOME)
    if not file.is_relative_to(home.resolve()):
        raise BadInput(
            f"{source!r} names {image['path']}, which is not inside its folder: use a data set that holds its images"
        )
    return file.read_bytes()
