"""The frame of every command that writes: a plan of what becomes of each photo, a new folder, and a manifest of it.

A command plans first and writes nothing while it plans. The folder is built under a temporary name and renamed when it
is whole. What it was made from is never changed.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.photo_set import MASKS, Entry, PhotoSet
from finetune import __version__
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.files import new_folder, sha256, write_json, write_text
from finetune.data.decoding import shown
from finetune.data.leftovers import MANIFEST

SCHEMA = 1
LIST = "metadata.jsonl"
ROOM = 1.05  # of the copied bytes: a disk needs some more than the files hold

Writer = Callable[[Path], None]


@dataclass(frozen=True)
class Written:
    """A file of the new folder: a copy of `source`, or what `make` writes to the path that it is given.

    `size`: about how many bytes it will have; None: as many as the source.
    """

    name: str
    source: Path
    make: Writer | None = None
    size: int | None = None

    @property
    def bytes(self) -> int:
        """About how many bytes it will have."""
        return self.source.stat().st_size if self.size is None else self.size


@dataclass(frozen=True)
class Step:
    """What becomes of one photo. `files` are written for it, its image first; none if it is left out.

    `action` is a past participle such as "copied", and `why` a reason, or empty. `caption` goes into the folder's list
    (None: it has files of its own, or none); `row` are further columns of that line. `quiet`: what is written is not
    the photo under another name, and is not told. `label`: what to call it where it is no file of its own, such as a
    row of a data set.
    """

    source: Path
    action: str
    why: str = ""
    files: tuple[Written, ...] = ()
    caption: str | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    quiet: bool = False
    label: str = ""

    @property
    def called(self) -> str:
        """What it is called: its label, or the file's name."""
        return self.label or self.source.name

    @property
    def target(self) -> str:
        """The image's name in the new folder, or empty."""
        return self.files[0].name if self.files else ""

    @property
    def line(self) -> str:
        """The step as a line for people."""
        to = f" as {self.target}" if self.target and self.target != self.source.name and not self.quiet else ""
        return shown(f"{self.called}: {self.action}{to}{f' ({self.why})' if self.why else ''}")


@dataclass(frozen=True)
class Plan:
    """A command's steps. `settings` are the options that led to them, for the manifest; `extra` are files of the
    folder that belong to no photo; `of`: what the steps are."""

    command: str
    source: Path
    steps: Sequence[Step]
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extra: tuple[Written, ...] = ()
    of: str = "photos"


@dataclass(frozen=True)
class Prepared:
    """What a command has done, or would do (`dry_run`). `out` is the new folder."""

    plan: Plan
    out: Path
    dry_run: bool

    @property
    def counts(self) -> dict[str, int]:
        """Action -> its number of photos, the most frequent first."""
        return dict(Counter(step.action for step in self.plan.steps).most_common())

    @property
    def sentence(self) -> str:
        """What was done in one line."""
        counts = ", ".join(f"{number} {action}" for action, number in self.counts.items())
        return f"{len(self.plan.steps)} {self.plan.of} of {self.plan.source}: {counts}"

    def values(self) -> dict[str, Any]:
        """The plan for JSON."""
        steps = [
            {"source": shown(step.called), "action": step.action, "why": step.why}
            | {"files": [file.name for file in step.files]}
            for step in self.plan.steps
        ]
        return {
            "command": self.plan.command, "source": str(self.plan.source), "out": str(self.out),
            "dry_run": self.dry_run, "counts": self.counts, "notes": list(self.plan.notes), "photos": steps,
        }  # fmt: skip


def copied(entry: Entry, folder: str = "", stem: str = "") -> tuple[Written, ...]:
    """A photo with its caption files and companions, unchanged, to a sub-folder or (empty) the folder itself.

    With a `stem` all of them get that name in place of their own.
    """
    stem = stem or entry.path.stem
    inside = f"{folder}/" if folder else ""
    files = [Written(f"{inside}{stem}{entry.path.suffix}", entry.path)]
    files += [Written(f"{inside}{stem}{file.suffix}", file) for file in entry.beside]
    files += [Written(f"{inside}{companion_name(file, entry, stem)}", file) for file in entry.further]
    files += [Written(f"{inside}{companion_name(file, entry, stem)}", file) for file in entry.companions]
    return tuple(files)


def companion_name(file: Path, entry: Entry, stem: str) -> str:
    """The name of a photo's mask or other companion, relative to the folder, when the photo is called `stem`."""
    own = f"{stem}{file.name[len(entry.path.stem) :]}"
    return f"{MASKS}/{own}" if file.parent.name == MASKS and file.parent != entry.path.parent else own


def in_list(photos: PhotoSet, entry: Entry) -> str | None:
    """The caption that must go into the new folder's list: those from files of their own are copied with these.

    It is empty, not None, where only the line's further columns are kept.
    """
    caption = entry.caption if photos.listed and not entry.beside else None
    return "" if caption is None and entry.row else caption


def kept(photos: PhotoSet, entry: Entry, action: str = "copied", why: str = "", folder: str = "") -> Step:
    """A step that copies a photo with all that belongs to it; a name that is not UTF-8 can't be written."""
    if shown(entry.path) != str(entry.path):
        return Step(entry.path, "left out", "its name is not UTF-8: rename it")
    return Step(entry.path, action, why, copied(entry, folder), in_list(photos, entry), entry.row)


def steps_of(photos: PhotoSet, made: Callable[[Entry], Step]) -> list[Step]:
    """What becomes of each photo, with progress."""
    steps = []
    with phase("Looking", len(photos.entries), "photos") as advance:
        for entry in photos.entries:
            steps.append(made(entry))
            advance(1, "")
    return steps


def carry_out(plan: Plan, out: Path, dry_run: bool = False) -> Prepared:
    """Writes the new folder `out` with its manifest; with `dry_run` only looks whether that could be done.

    Raises:
        BadInput: `out` exists, lies inside the source or around it, two photos would get one name, no photo is left,
            or the disk has too little room.
    """
    out = Path(out).expanduser()
    refuse_place(plan.source, out)
    _refuse_names(plan)
    _refuse_little_room(plan, out)
    if not dry_run:
        _write_all(plan, out)
    return Prepared(plan, out, dry_run)


def _write_all(plan: Plan, out: Path) -> None:
    try:
        with new_folder(out) as temporary:
            rows = list(_write(plan, temporary))
            others = _write_lists(plan, temporary) | {file.name: _write_file(file, temporary) for file in plan.extra}
            write_json(temporary / MANIFEST, _manifest(plan, rows, others))
    except FileExistsError as error:
        if Path(error.filename or "") != out:
            raise
        raise BadInput(f"another command made {out} meanwhile: this one wrote nothing, give a new folder") from error


def refuse_place(source: Path, out: Path) -> None:
    """Looks where a command is to write, before hours of work.

    Raises:
        BadInput: `out` exists, or lies inside the source or around it.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    if out.exists() or out.is_symlink():
        raise BadInput(f"{out} already exists: give a new folder, or take that one back with --undo {out}", path=out)
    here, home = out.resolve(), source.resolve()
    if here.is_relative_to(home) or home.is_relative_to(here):
        raise BadInput(f"{out} lies inside {source}, which stays as it is: give a folder elsewhere", path=out)


def _refuse_names(plan: Plan) -> None:
    """Two files of one name, on file systems that know no case either, or no two ways to write an accent."""
    seen: dict[str, Path] = {}
    for step in plan.steps:
        for file in step.files:
            other = seen.setdefault(unicodedata.normalize("NFC", file.name).lower(), file.source)
            if other != file.source:
                raise BadInput(
                    f"{shown(other.name)} and {shown(file.source.name)} would both become {shown(file.name)}: "
                    "rename one"
                )
    if not plan.extra and not any(step.files for step in plan.steps):
        raise BadInput(f"nothing of {plan.source} would be left: {plan.steps[0].why or 'choose other options'}")


def _refuse_little_room(plan: Plan, out: Path) -> None:
    place = next(folder for folder in [out.absolute(), *out.absolute().parents] if folder.exists())
    needed = ROOM * sum(file.bytes for step in plan.steps for file in step.files)
    needed += ROOM * sum(file.size or 0 for file in plan.extra)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise BadInput(
            f"{out} would need {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: free some space, or give a "
            "folder on another disk",
            path=out,
        )


def _write(plan: Plan, folder: Path) -> Iterator[dict[str, Any]]:
    """Writes the files and gives the manifest's row of each photo."""
    done: dict[str, str] = {}
    with phase("Writing", len(plan.steps), "photos") as advance:
        for step in plan.steps:
            for file in step.files:
                if file.name not in done:  # a.jpg and a.png share a.txt
                    done[file.name] = _write_file(file, folder)
            yield {
                "source": shown(step.called), "sha256": "" if step.label else _digest(step.source),
                "action": step.action, "why": step.why,
                "files": {file.name: done[file.name] for file in step.files},
            }  # fmt: skip
            advance(1, "")


def _digest(file: Path) -> str:
    """The SHA-256 of a photo; empty if it can't be read, such as a broken link."""
    try:
        return sha256(file)
    except OSError:
        return ""


def _write_file(file: Written, folder: Path) -> str:
    target = folder / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.make is None:
        shutil.copyfile(file.source, target)
    else:
        file.make(target)
    return sha256(target)


def _write_lists(plan: Plan, folder: Path) -> dict[str, str]:
    """Writes metadata.jsonl where captions are not in files of their own, one in each sub-folder with photos."""
    lines: dict[str, list[str]] = {}
    for step in plan.steps:
        if step.files and step.caption is not None:
            place = PurePosixPath(step.target)
            row = {"file_name": place.name, "text": step.caption, **step.row}
            lines.setdefault(f"{place.parent}/{LIST}".removeprefix("./"), []).append(
                json.dumps(row, ensure_ascii=False)
            )
    for name, rows in lines.items():
        write_text(folder / name, "\n".join(rows) + "\n")
    return {name: sha256(folder / name) for name in lines}


def _manifest(plan: Plan, rows: list[dict[str, Any]], others: dict[str, str]) -> dict[str, Any]:
    return {
        "schema": SCHEMA, "finetune": __version__, "command": plan.command, "settings": dict(plan.settings),
        "source": str(plan.source.resolve()), "notes": list(plan.notes), "photos": rows, "files": others,
    }  # fmt: skip


def with_caption(step: Step, entry: Entry, caption: str | None) -> Step:
    """The step with a new caption (None: none), in a file or in the list, wherever the old one was."""
    if not step.files:
        return step
    if step.caption is not None and not entry.beside:
        return replace(step, caption="" if caption is None and step.row else caption)
    place = PurePosixPath(step.target)
    own = {f"{place.with_suffix(file.suffix)}" for file in entry.beside}
    files = [file for file in step.files if file.name not in own]
    if caption is not None:
        files.append(Written(str(place.with_suffix(".txt")), entry.path, lambda path: _write_caption(path, caption)))
    return replace(step, files=tuple(files))


def _write_caption(path: Path, caption: str) -> None:
    path.write_text(f"{caption}\n", encoding="utf-8", newline="\n")
