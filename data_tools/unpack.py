"""A data set of the hub (or a local one that `datasets` reads) as a folder of photos with captions."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput
from finetune.core.files import write_text


def unpack(source: str, out: Path, split: str, image: str, caption: str, limit: int | None) -> int:
    """Writes OUT/00000.png, ... (the stored bytes, not encoded again) and OUT/metadata.jsonl; how many there are.

    `source` is a hub id, an image folder, or a .parquet file.

    Raises:
        BadInput: no such data set, split or column; OUT is already there.
    """
    if out.exists():
        raise BadInput(f"{out} is already there: give another folder, or remove it")
    rows = _rows(source, split, image, caption)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    lines = []
    for number, row in enumerate(rows if limit is None else rows.select(range(min(limit, len(rows))))):
        name = _write(row[image], temporary, number)
        if row.get(caption):
            lines.append(json.dumps({"file_name": name, "text": row[caption]}, ensure_ascii=False) + "\n")
    if lines:
        write_text(temporary / "metadata.jsonl", "".join(lines))
    temporary.rename(out)
    return number + 1


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


def _write(stored: dict[str, Any], folder: Path, number: int) -> str:
    """The stored bytes under a name with their true format's ending."""
    from PIL import Image

    data = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        ending = (image.format or "png").lower().replace("jpeg", "jpg")
    name = f"{number:05d}.{ending}"
    (folder / name).write_bytes(data)
    return name
