"""Changes of photos that a person asked for: each is tried first, then kept, and can be taken back.

What a change replaced lies in FOLDER/changed/SET/NUMBER/before, so that nothing that was sent is lost.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput
from finetune.core.files import sha256, write_json
from finetune.core.reading import read_json
from finetune.ui.photo_work import RECORD
from finetune.ui.uploads import MASK, Uploads, one_of

KINDS = ("crop", "mask")


class Changes:
    """The changes of the sets of photos."""

    def __init__(self, uploads: Uploads) -> None:
        self.uploads = uploads

    def tried(self, chosen: str, name: str, what: str) -> Path:
        """Where the trial of a change lies.

        Raises:
            BadInput: there is no such set, photo or change.
        """
        if what not in KINDS:
            raise BadInput("the server knows nothing of this change: load the page again")
        one_of(self.uploads.photos_of(chosen), name)
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        return self.uploads.folder / "tried" / chosen / f"{digest}-{what}"

    def keep(self, chosen: str, name: str, what: str) -> str:
        """Makes the trial of a change the photo. Returns the photo's name, which may have a new ending.

        Raises:
            BadInput: it was not tried, the photo changed since, or another file has a name that it needs.
        """
        photos, tried = self.uploads.photos_of(chosen), self.tried(chosen, name, what)
        if not (tried / RECORD).is_file():
            raise BadInput(f"this was not tried with {name!r} yet: load the page again")
        record = read_json(tried / RECORD, dict)
        now = {
            file.name: sha256(file) for file in (photos / name, photos / f"{Path(name).stem}{MASK}") if file.is_file()
        }
        if not now.items() <= record["of"].items():
            raise BadInput(f"{name!r} or its mask changed since this was tried: try it again")
        taken = [new for new in record["new"] if new not in record["gone"] and (photos / new).exists()]
        if taken:
            raise BadInput(f"{taken[0]} is there already, so the changed photo can't have that name: rename one")
        last = max((int(folder.name) for folder, _ in self._records(chosen)), default=-1)
        change = self._home(chosen) / f"{last + 1:06d}"
        before = change / "before"
        for file in record["gone"]:
            _move(photos / file, before / file)
        for file in record["new"]:
            _move(tried / "result" / file, photos / file)
        write_json(change / RECORD, record)
        shutil.rmtree(tried)
        self._forget_copies(chosen, record)
        return str(record["now"])

    def undo(self, chosen: str, name: str) -> str:
        """Takes back the last change of a photo. Returns the photo's name before it.

        Raises:
            BadInput: the photo has no change, or another one has its old name now.
        """
        photos = self.uploads.photos_of(chosen)
        one_of(photos, name)
        own = [(folder, held) for folder, held in self._records(chosen) if held["now"] == name]
        if not own:
            raise BadInput(f"{name!r} is as it was sent: there is nothing to take back")
        change, record = own[-1]
        taken = [old for old in record["gone"] if old not in record["new"] and (photos / old).exists()]
        if taken:
            raise BadInput(
                f"another {taken[0]} was sent since, so the first one can't come back: leave that out first"
            )
        for file in record["new"]:
            (photos / file).unlink(missing_ok=True)
        for file in record["gone"]:
            _move(change / "before" / file, photos / file)
        shutil.rmtree(change)
        self._forget_copies(chosen, record)
        return str(record["was"])

    def of(self, chosen: str) -> dict[str, list[str]]:
        """Photo -> what was done to it, in order."""
        found: dict[str, list[str]] = {}
        for _, record in self._records(chosen):
            found[record["now"]] = [*found.pop(record["was"], []), record["what"]]
        return found

    def _home(self, chosen: str) -> Path:
        return self.uploads.folder / "changed" / self.uploads.photos_of(chosen).name

    def _records(self, chosen: str) -> list[tuple[Path, dict[str, Any]]]:
        home = self._home(chosen)
        folders = sorted(home.iterdir()) if home.is_dir() else []
        return [(each, read_json(each / RECORD, dict)) for each in folders if (each / RECORD).is_file()]

    def _forget_copies(self, chosen: str, record: dict[str, Any]) -> None:
        small = self.uploads.small_of(chosen)
        for name in (record["was"], record["now"]):
            for size in ("small", "large"):
                (small / f"{name}.{size}.jpg").unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
