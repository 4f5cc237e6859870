"""Takes back what a command wrote: the files of its manifest that are still as it wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from data_tools.work import SCHEMA
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.files import leads_out, sha256
from finetune.core.reading import read_json
from finetune.core.records import check_schema
from finetune.data.leftovers import MANIFEST

ADVICE = "give the folder that a command wrote, or its data-manifest.json"


@dataclass(frozen=True)
class Undone:
    """What was removed from `folder` (with `dry_run`: would be), and what stays because it was changed or added."""

    folder: Path
    removed: list[str]
    kept: list[str]
    dry_run: bool

    @property
    def sentence(self) -> str:
        """What was done in one line."""
        verb = "would be removed" if self.dry_run else "removed"
        stays = f"; {len(self.kept)} stay, changed or added since: {', '.join(self.kept[:5])}" if self.kept else ""
        return f"{len(self.removed)} files of {self.folder} {verb}{stays}"

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "command": "undo", "folder": str(self.folder), "dry_run": self.dry_run, "removed": self.removed,
            "kept": self.kept,
        }  # fmt: skip


def undo(place: Path, dry_run: bool = False) -> Undone:
    """Removes the files that a manifest names, each only if its content is what was written, and empty folders.

    The photos that they were made from are not touched. An undo that was interrupted can be repeated: the manifest
    goes last.

    Raises:
        BadInput: there is no manifest, it is not one of a command, or it names files outside of its folder; or what
            it was made from is gone.
    """
    place = Path(place).expanduser()
    manifest = place / MANIFEST if place.is_dir() else place
    if manifest.name != MANIFEST or not manifest.is_file():
        raise BadInput(f"there is no {MANIFEST} in {place}: {ADVICE}", path=place)
    values = read_json(manifest, dict, ADVICE)
    folder, files = manifest.parent, _files(manifest, values)
    _refuse_only_copies(manifest, values)
    there = {name for name in files if (folder / name).is_file()}
    with phase("Comparing", len(there), "files") as advance:
        removed = [name for name in sorted(there) if _as_written(folder / name, folder, files[name], advance)]
    if not dry_run:
        for name in removed:
            (folder / name).unlink()
        manifest.unlink()
        _remove_empty(folder)
    return Undone(folder, removed, _others(folder, {*removed, MANIFEST}), dry_run)


def _refuse_only_copies(manifest: Path, values: dict[str, Any]) -> None:
    """Nothing is removed where the source is gone. Of a data set of the hub, whose id is no path, it is the hub."""
    source = str(values.get("source", ""))
    if Path(source).is_absolute() and not Path(source).exists():
        raise BadInput(
            f"{source}, which {manifest.parent} was made from, is gone, so these may be the only copies: "
            "nothing was removed",
            path=manifest,
        )


def _files(manifest: Path, values: dict[str, Any]) -> dict[str, str]:
    """Name -> SHA-256 of every file that was written."""
    check_schema(values.get("schema"), manifest, SCHEMA)
    try:
        found: dict[str, str] = dict(values["files"])
        for row in values["photos"]:
            found |= dict(row["files"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{manifest} is not the manifest of a command: {ADVICE}", path=manifest) from error
    for name in found:
        if not _is_inside(name):
            raise BadInput(
                f"{manifest} names {name!r}, which is not in its folder: nothing was removed", path=manifest
            )
    return found


def _is_inside(name: Any) -> bool:
    if not isinstance(name, str) or PureWindowsPath(name).is_absolute() or PureWindowsPath(name).drive:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and name not in ("", ".", MANIFEST)


def _as_written(file: Path, folder: Path, digest: str, advance: Any) -> bool:
    same = not leads_out(file, folder) and sha256(file) == digest
    advance(1, "")
    return same


def _remove_empty(folder: Path) -> None:
    inside = [path for path in sorted(folder.rglob("*"), reverse=True) if path.is_dir() and not path.is_symlink()]
    for path in [*inside, folder]:
        if not any(path.iterdir()):
            path.rmdir()


def _others(folder: Path, gone: set[str]) -> list[str]:
    if not folder.is_dir():
        return []
    files = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [name for name in files if name not in gone]
