"""What a folder holds for training: its photos, each with its caption, masks and companions.

A set is read from whatever `data.photos` of a recipe may name. Nothing here writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.captions import LISTS, caption_files, captions_beside, further_columns
from finetune.data.photos import MASK, Photo, image_files, is_companion, no_images
from finetune.data.settings import MIX_NAME
from finetune.data.sources.registry import open_source

MASKS = "masks"  # the folder masks/NAME.png
COPIED = re.compile(r"^copy of |( |-|_)(copy|kopie|copie|copia)( ?\(?\d+\)?)?$| ?\(\d+\)$", re.IGNORECASE)  # of a stem


@dataclass(frozen=True)
class Entry:
    """A photo of a set. `beside` are its own caption files, `companions` its masks and NAME.depth.png and the like.

    `caption` is what training would read, or None. `row` holds the other columns of its line in the list.
    `further`: its other captions, PHOTO.NAME.txt.
    """

    path: Path
    caption: str | None = None
    beside: tuple[Path, ...] = ()
    companions: tuple[Path, ...] = ()
    row: dict[str, Any] = field(default_factory=dict)
    further: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """The file's name, without the folder."""
        return self.path.name


@dataclass(frozen=True)
class PhotoSet:
    """The photos of `folder`. `listed`: some captions are in a list of the whole folder, not in files of their own."""

    folder: Path
    entries: list[Entry]
    listed: bool = False
    notes: tuple[str, ...] = ()


def read_set(source: Path) -> PhotoSet:
    """Reads the photos' names, captions and companions. The photos themselves are not opened.

    Raises:
        BadInput: there is no such folder, no image in it, or captions that can't be read.
    """
    source = Path(source).expanduser()
    opened = open_source(source)
    folder = opened.folder
    paths = image_files(folder)
    if not paths:
        raise no_images(source, folder)
    photos = [Photo(path, (0, 0), "") for path in paths]
    captions, beside = caption_files(folder, photos), captions_beside(folder, photos)
    companions, rows = _companions(folder, paths), further_columns(folder)
    further = further_captions(folder, paths)
    entries = [
        Entry(
            path,
            captions.get(path.name),
            tuple(beside.get(path.stem, ())),
            tuple(companions.get(path.stem, ())),
            rows.get(path.name, {}),
            tuple(further.get(path.stem, ())),
        )
        for path in paths
    ]
    listed = any((folder / name).is_file() for name in LISTS)
    return PhotoSet(folder, entries, listed, (opened.unused,) if opened.unused else ())


def name_rank(name: str) -> tuple[bool, str, str]:
    """Sorts names of photos that are alike: "IMG.JPG" before "IMG copy.JPG", "IMG (1).JPG" and "Copy of IMG.JPG"."""
    stem = Path(name).stem
    return COPIED.search(stem) is not None, stem, name


def is_mask(file: Path) -> bool:
    """Whether a companion of a photo is its mask."""
    return file.name.lower().endswith(MASK) or file.parent.name == MASKS


def _companions(folder: Path, paths: list[Path]) -> dict[str, list[Path]]:
    """A photo's name without suffix -> its masks and other companions, sorted."""
    stems = {path.stem for path in paths}
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.name.lower().endswith(MASK) and file.name[: -len(MASK)] in stems:
            found.setdefault(file.name[: -len(MASK)], []).append(file)
        elif is_companion(file, stems) and file.is_file():
            found.setdefault(file.stem.rpartition(".")[0], []).append(file)
    inside = sorted((folder / MASKS).glob("*.png")) if (folder / MASKS).is_dir() else []
    for file in inside:
        if file.stem in stems:
            found.setdefault(file.stem, []).append(file)
    return found


def further_captions(folder: Path, paths: list[Path]) -> dict[str, list[Path]]:
    """A photo's name without suffix -> its files PHOTO.NAME.txt, sorted, which `data.caption_mix` can name.

    a.png.txt is none: it was meant to be the own caption of a.png.
    """
    stems, names = {path.stem for path in paths}, {path.name for path in paths}
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.*.txt")):
        stem, _, name = file.stem.rpartition(".")
        if stem in stems and file.stem not in stems | names and MIX_NAME.fullmatch(name):
            found.setdefault(stem, []).append(file)
    return found
