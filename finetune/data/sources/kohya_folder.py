"""kohya's layout: photos in a sub-folder "10_sks dog" of the folder that is named (repeats, token, class noun)."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.core.errors import BadInput
from finetune.data.decoding import shown
from finetune.data.photos import image_files
from finetune.data.sources.base import Opened, Source

NAME = re.compile(r"(\d+)_(.+)")


class KohyaFolder(Source):
    """One such sub-folder, with no photos beside it. Where there is one, its repeats change nothing: they would only
    make an epoch longer, and a run counts steps. Several are several subjects, or weights that we have not."""

    name = "kohya"

    @classmethod
    def matches(cls, path: Path) -> bool:
        return path.is_dir() and not image_files(path) and bool(_folders(path))

    def open(self, path: Path) -> Opened:
        folders = _folders(path)
        names = ", ".join(repr(shown(folder.name)) for folder in folders)
        if len(folders) > 1:
            raise BadInput(
                f"{path} has photos in {len(folders)} sub-folders ({names}), whose repeats are not read: make a "
                "recipe of them with `finetune data convert`, which gives each subject its own entry of data.subjects",
                path=path,
            )
        return Opened(
            folders[0],
            f"read from the sub-folder {names}, of whose name nothing counts: token and noun are the recipe's",
        )


def _folders(path: Path) -> list[Path]:
    found = sorted(entry for entry in path.iterdir() if NAME.fullmatch(entry.name) and entry.is_dir())
    return [folder for folder in found if image_files(folder)]
