"""Writes a data set of the hub, or a local one that `datasets` reads, as a folder of photos with captions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from data_tools.endings import ending_of
from data_tools.show import add_run, say, say_json, whole_number
from data_tools.work import LIST, SCHEMA
from finetune import __version__
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.files import new_folder, sha256, write_json, write_text
from finetune.data.leftovers import MANIFEST
from finetune.data.photos import opened


def unpack(source: str, out: Path, split: str, image: str, caption: str, limit: int | None) -> int:
    """Writes OUT/00000.png, ... (the stored bytes, not encoded again), OUT/metadata.jsonl and the manifest.

    Args:
        source: a hub id, an image folder, or a .parquet file.
        out: the new folder.
        split: the name of the data set's split.
        image: the column with the images.
        caption: the column with the captions; it may be missing.
        limit: the most images to write; None for all.

    Returns:
        The number of images.

    Raises:
        BadInput: there is no such data set, split or column; or OUT already exists.
    """
    _refuse_place(out)
    rows = _chosen(_rows(source, split, image, caption), limit)
    lines, written, others = [], [], {}
    with new_folder(out) as temporary, phase("Writing", len(rows), "photos") as advance:
        for number, row in enumerate(rows):
            name = _write(_stored(row[image], source), temporary, number)
            written.append((f"row {number}", name, sha256(temporary / name)))
            if row.get(caption):
                lines.append(json.dumps({"file_name": name, "text": row[caption]}, ensure_ascii=False) + "\n")
            advance(1, "")
        if lines:
            write_text(temporary / LIST, "".join(lines))
            others = {LIST: sha256(temporary / LIST)}
        settings = {"split": split, "image": image, "caption": caption, "limit": limit}
        write_json(temporary / MANIFEST, _manifest(source, settings, written, others))
    return len(written)


def _chosen(rows: Any, limit: int | None) -> Any:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _manifest(
    source: str, settings: dict[str, Any], written: list[tuple[str, str, str]], others: dict[str, str]
) -> dict[str, Any]:
    """As `data_tools.work` writes it. `written`: the row, its file, and that file's SHA-256."""
    photos = [
        {"source": row, "sha256": digest, "action": "written", "why": "", "files": {name: digest}}
        for row, name, digest in written
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
    if options.dry_run:
        _refuse_place(options.out)
        count = len(_chosen(_rows(options.source, *asked), options.limit))
    else:
        count = unpack(options.source, options.out, *asked, options.limit)
    if options.json:
        say_json({"command": "unpack", "out": str(options.out), "dry_run": options.dry_run, "images": count})
        return 0
    if options.dry_run:
        say(f"nothing was written (--dry-run): {options.out} would hold {count} images")
        return 0
    say(f"{count} images in {options.out}; check them with: python -m data_tools check {options.out}")
    return 0


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


def _stored(image: dict[str, Any], source: str) -> bytes:
    """An image's bytes, from the data set or from one of its files.

    A data set can name any file on this disk, so a file outside the data set's folder is refused with BadInput.
    """
    import datasets

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


def _write(data: bytes, folder: Path, number: int) -> str:
    """Writes the stored bytes to a file with the extension of their actual format; returns its name."""
    with opened(folder / f"{number:05d}", data) as image:
        name = f"{number:05d}.{ending_of(image)}"
    (folder / name).write_bytes(data)
    return name
