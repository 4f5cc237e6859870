"""What a scan found in the photos of a folder, so that a later start decodes only what is new.

A photo is known while its file's size, both of its times and its inode stay as they were, as the hashes of bases are
(`finetune.families.digests`). `finetune doctor --rehash` forgets all of them.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from pathlib import Path

import PIL

from finetune.core.errors import BadInput
from finetune.core.files import cache_dir, write_json
from finetune.core.progress import is_main_process
from finetune.core.reading import read_json

VERSION = 1  # of what a scan checks; photos of another one are decoded again
YOUNG = 2.0  # seconds: a file that changed so recently could change again without another time
FACTS = re.compile(r"(\d+:\d+:\d+:\d+) (\d{1,9}) (\d{1,9}) ([0-9a-f]{64}) ([01])")

PhotoFacts = tuple[
    tuple[int, int], str, bool
]  # the fields of a `finetune.data.photos.Photo`: size, digest, recoloured


class KnownPhotos:
    """The photos of one folder that were decoded before."""

    def __init__(self, folder: Path) -> None:
        name = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
        self.file = _kept() / f"{name[:32]}.json"
        self._made_with = f"{VERSION}, Pillow {PIL.__version__}"
        self._old = self._read()
        self._new: dict[str, str] = {}

    def find(self, file: Path) -> PhotoFacts | None:
        """What was found in a file of the folder; None where it is not known, or changed."""
        told = FACTS.fullmatch(self._old.get(file.name, ""))
        if told is None or told[1] != file_state(file):
            return None
        self._new[file.name] = told[0]
        return (int(told[2]), int(told[3])), told[4], told[5] == "1"

    def add(self, file: Path, state: str, facts: PhotoFacts) -> None:
        """Remembers what was found in a file. `state`: its `file_state` before it was read; empty: it is not kept."""
        if state:
            (width, height), digest, recoloured = facts
            self._new[file.name] = f"{state} {width} {height} {digest} {int(recoloured)}"

    def write(self) -> None:
        """Keeps what was found and added since this was opened, and forgets all else. A full disk loses it. Of several
        processes the first writes."""
        if self._new == self._old or not is_main_process():
            return
        try:
            write_json(self.file, {"made_with": self._made_with, "photos": self._new})
        except OSError:
            return

    def _read(self) -> dict[str, str]:
        """Nothing where the file is damaged, since it can be made again."""
        try:
            held = read_json(self.file, dict) if self.file.is_file() else {}
        except (BadInput, OSError):
            return {}
        found = held.get("photos") if held.get("made_with") == self._made_with else None
        return {name: str(facts) for name, facts in found.items()} if isinstance(found, dict) else {}


def forget_scans() -> None:
    """Removes all that is known of photos, so that every one is decoded again when it is next needed."""
    shutil.rmtree(_kept(), ignore_errors=True)


def _kept() -> Path:
    return cache_dir() / "scans"


def file_state(file: Path) -> str:
    """What changes with a file's content; empty where that can't be told."""
    try:
        stat = file.stat()
    except OSError:  # a broken link: reading it says so
        return ""
    if time.time() - max(stat.st_mtime, stat.st_ctime) < YOUNG:
        return ""
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
