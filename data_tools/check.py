"""Checks a folder of photos before training: facts, problems and near-duplicates, photo by photo and of the set."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from data_tools import alike
from data_tools.faces import load_faces
from data_tools.for_base import USUAL, add_base, add_detector, base_and_resolution, detector_of
from data_tools.framing import Sought, framing
from data_tools.hashes import NEAR, Look, difference_hash, look_of, near_pairs
from data_tools.lettering import told_of_lines
from data_tools.photo_set import further_captions, name_rank
from data_tools.quality import Quality, faults, measure
from data_tools.show import say_json
from data_tools.wording import Wanted, check_caption, read_wanted
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.data.captions import BESIDE, LISTS, caption_files, caption_rows
from finetune.data.decoding import BadImage, opened
from finetune.data.leftovers import MANIFEST
from finetune.data.photos import MASK, Photo, image_files, is_companion, no_images, read_image
from finetune.data.sources.registry import open_source

if TYPE_CHECKING:
    from data_tools.vision import Detector

__all__ = ["NEAR", "File", "Findings", "check", "difference_hash", "look_at"]

ORIENTATIONS = {
    2: "mirrored",
    3: "upside down",
    4: "upside down, mirrored",
    5: "sideways, mirrored",
    6: "sideways",
    7: "sideways, mirrored",
    8: "sideways",
}
CROPPED_AWAY = 2.0  # longer side / shorter side: a square crop then loses half of the photo or more
FURTHER = ("MPO",)  # phones' JPEGs: what else they hold is no film
MOST_FRAMES = 1_000  # counting stops here
NAMED = 5  # names in a sentence
ROWS = 200  # of the table, the worst first: of thousands only the best would still be on the screen
Verdict = Literal["leave out", "look at it", "good"]
VERDICTS: tuple[Verdict, ...] = ("leave out", "look at it", "good")  # the worst first


@dataclass
class File:
    """What is known about one image file.

    `size` is (width, height) in pixels as shown; `orientation` is how the file stores it. `digest` is the SHA-256 of
    the file and `fingerprint` its 64-bit dHash. `problems` need the user's attention. `notes` need none: training
    handles them by itself (it applies the EXIF rotation, puts transparency on white, ...). `copy_of` is an
    earlier file that holds the same bytes.
    """

    path: Path
    size: tuple[int, int] | None = None
    orientation: str = ""
    caption: str | None = None
    digest: str = ""
    fingerprint: int | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    quality: Quality | None = None
    look: Look | None = None
    thumb: np.ndarray | None = None  # grey [side, side], of the first photos
    copy_of: str = ""

    @property
    def name(self) -> str:
        """The file's name, without the folder."""
        return self.path.name

    @property
    def verdict(self) -> Verdict:
        """What to do with it: it can't be used or adds nothing, it has problems, or neither."""
        if self.size is None or self.copy_of:
            return "leave out"
        return "look at it" if self.problems else "good"


@dataclass
class Findings:
    """The files of a folder by name, and problems and notes about the folder as a whole."""

    folder: Path
    files: list[File]
    problems: list[str]
    notes: list[str]

    @property
    def fine(self) -> bool:
        """Whether there are no problems."""
        return not self.problems and not any(file.problems for file in self.files)

    @property
    def worst_first(self) -> list[File]:
        """The files by verdict and number of problems, then by name."""
        return sorted(self.files, key=lambda file: (VERDICTS.index(file.verdict), -len(file.problems), file.name))

    @property
    def verdict(self) -> str:
        """The verdict for the set in one sentence."""
        if self.fine:
            return "nothing to do"
        counts = Counter(file.verdict for file in self.files)
        parts = [f"{counts[verdict]} to {verdict.removesuffix(' it')}" for verdict in VERDICTS[:2] if counts[verdict]]
        parts += [f"{len(self.problems)} of the whole set"] if self.problems else []
        return f"see the problems above ({', '.join(parts)})"

    def values(self) -> dict[str, object]:
        """Everything for JSON, the worst files first."""
        about = {"folder": self.folder.as_posix(), "fine": self.fine, "verdict": self.verdict}
        return about | {
            "problems": self.problems,
            "notes": self.notes,
            "files": [_file_values(file) for file in self.worst_first],
        }


def check(
    folder: Path, resolution: int = USUAL, wanted: Wanted | None = None, detector: Detector | None = None
) -> Findings:
    """Checks every image of a folder for training at `resolution` pixels, and returns the findings.

    `folder` may be anything that `data.photos` of a recipe names. `wanted` says what captions are checked against.
    What a `detector` finds must not be cut at the edges. Without one faces are looked for, if OpenCV is installed.

    Raises:
        BadInput: there is no such folder, or no image in it.
    """
    opened_source = open_source(Path(folder).expanduser())
    place = opened_source.folder
    paths = image_files(place)
    if not paths:
        raise no_images(folder, place)
    faces, why_not = load_faces() if detector is None else (None, "")
    files = look_at(paths, resolution, Sought(detector, faces))
    _compare(files)
    findings = Findings(place, files, _of_the_set(files), _other_files(place, paths))
    findings.notes += [text for text in (opened_source.unused, why_not) if text]
    _captions(findings, wanted or Wanted())
    return findings


def look_at(paths: Sequence[Path], resolution: int, sought: Sought | None = None) -> list[File]:
    """Opens every image once and returns what there is to say of each alone."""
    files = []
    with phase("Looking", len(paths), "photos") as advance:
        for number, path in enumerate(paths):
            files.append(_look(path, resolution, number < alike.MOST, sought or Sought()))
            advance(1, "")
    return files


def _look(path: Path, resolution: int, with_thumb: bool, sought: Sought) -> File:
    file = File(path)
    try:
        photo, upright = read_image(path)
        _header(file, path.read_bytes())
    except BadImage as fault:
        file.problems.append(fault.reason)
        return file
    width, height = file.size = photo.size
    file.look = look_of(upright)
    file.digest, file.fingerprint = photo.digest, file.look.dhash
    if photo.recoloured:
        file.notes.append("another colour profile: converted to sRGB")
    if min(width, height) < resolution:
        file.problems.append(f"low resolution: enlarged {resolution / min(width, height):.1f} times to {resolution}")
    longer = max(width, height) / min(width, height)
    if longer >= CROPPED_AWAY:
        file.problems.append(f"extreme shape: a square crop keeps {1 / longer:.0%} of it")
    file.quality = measure(upright, resolution)
    file.problems += faults(file.quality) if file.quality is not None else []
    for problems, notes in (told_of_lines(upright), _framing(path, upright, sought)):
        file.problems += problems
        file.notes += notes
    if _is_grey(upright):
        file.notes.append("grey")
    if with_thumb:
        file.thumb = alike.thumb_of(upright)
    return file


def _framing(path: Path, upright: Image.Image, sought: Sought) -> tuple[list[str], list[str]]:
    try:
        return framing(path, upright, sought)
    except BadImage as fault:
        return [f"its mask can't be used: {fault.reason}"], []


def _is_grey(upright: Image.Image) -> bool:
    values = np.asarray(upright)
    return np.array_equal(values[..., 0], values[..., 1]) and np.array_equal(values[..., 1], values[..., 2])


def _header(file: File, content: bytes) -> None:
    """Notes what the file's header says, before the image is turned upright and converted to RGB."""
    with opened(file.path, content) as image:
        file.orientation = ORIENTATIONS.get(image.getexif().get(0x0112, 1), "")
        mode, file_format = image.mode, image.format
        alpha = mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        frames = _frames(image)
    if alpha:
        file.notes.append("transparency: put on white")
    if mode.startswith(("I", "F")):
        file.notes.append("16 bits or more: scaled to 8")
    if mode == "CMYK":
        file.notes.append("CMYK: converted")
    if frames > 1 and file_format in FURTHER:
        file.notes.append("the file holds a further picture, such as a gain map, which is not used")
    elif frames > 1:
        many = f"more than {MOST_FRAMES}" if frames > MOST_FRAMES else frames
        file.notes.append(f"the first of {many} frames is used")


def _frames(image: Image.Image) -> int:
    """The number of frames, counted up to MOST_FRAMES + 1: a file may claim millions."""
    for number in range(1, MOST_FRAMES + 1):
        try:
            image.seek(number)
        except EOFError:
            return number
    return MOST_FRAMES + 1


def _compare(files: list[File]) -> None:
    """Finds files that equal an earlier one, byte for byte or nearly so to the eye."""
    first: dict[str, File] = {}
    for file in sorted(files, key=lambda each: name_rank(each.name)):
        other = first.setdefault(file.digest, file) if file.digest else file
        if other is not file:
            file.copy_of = other.name
            file.problems.append(f"the same file as {other.name}")
    seen = [file for file in sorted(files, key=_rank) if file.look is not None]  # as dedupe chooses: the largest stays
    said: set[int] = set()
    for pair in near_pairs([file.look for file in seen if file.look is not None]):
        one, other = seen[pair.second], seen[pair.first]
        if pair.second in said or one.copy_of:
            continue
        said.add(pair.second)
        one.problems.append(f"nearly the same as {other.name} ({pair.bits} of 64 bits differ)")


def _rank(file: File) -> tuple[int, tuple[bool, str, str]]:
    width, height = file.size or (0, 0)
    return -width * height, name_rank(file.name)


def _of_the_set(files: list[File]) -> list[str]:
    """What only many photos show: one background, one mark. Copies and photos with bars say nothing of that."""
    bare = [file for file in files if not file.copy_of and not any(file.quality.bars if file.quality else ())]
    apart = [file for file in bare if not any(text.startswith("nearly the same") for text in file.problems)]
    found = alike.same_background([file.look.small for file in apart if file.look is not None])
    found += alike.same_mark([file.thumb for file in apart if file.thumb is not None])
    return found


def _captions(findings: Findings, wanted: Wanted) -> None:
    """Adds each file's caption and its faults. Captions for only some files, and captions without an image, are
    problems."""
    names = {file.name for file in findings.files}
    try:
        found = caption_files(findings.folder, [Photo(file.path, (0, 0), "") for file in findings.files])
        rows = caption_rows(findings.folder)
    except BadInput as fault:
        findings.problems.append(str(fault))
        return
    for file in findings.files:
        file.caption = found.get(file.name)
        if file.caption is not None:
            faulty = check_caption(file.caption, wanted)
            file.problems += faulty.problems
            file.notes += faulty.notes
    without = [file.name for file in findings.files if file.caption is None]
    if found.keys() & names and without:
        findings.problems.append(
            f"no caption for {_some(without)}, while the others have one: training uses a template for these"
        )
    orphans = sorted(rows.keys() - names)
    if orphans:
        findings.problems.append(f"captions for images that are not there: {_some(orphans)}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _other_files(folder: Path, images: list[Path]) -> list[str]:
    """Files that training does not read: videos, raw photos, captions whose name matches no image."""
    stems, photos = {path.stem for path in images}, set(images)
    further = {file for files in further_captions(folder, images).values() for file in files}
    others = []
    for path in sorted(folder.iterdir()):
        is_caption = path.suffix.lower() in BESIDE and path.stem in stems
        is_mask = path.name == "masks" or (path.name.lower().endswith(MASK) and path.name[: -len(MASK)] in stems)
        beside = is_caption or is_mask or is_companion(path, stems) or path in further
        if path.name.startswith(".") or beside or path in photos or path.name in (*LISTS, MANIFEST):
            continue
        others.append(path.name + ("/" if path.is_dir() else ""))
    return [f"not read: {_some(others)}"] if others else []


def _file_values(file: File) -> dict[str, object]:
    return {
        "name": file.name,
        "verdict": file.verdict,
        "size": file.size,
        "orientation": file.orientation or None,
        "caption": file.caption,
        "sha256": file.digest or None,
        "dhash": None if file.fingerprint is None else f"{file.fingerprint:016x}",
        "sharpness": None if file.quality is None else round(file.quality.sharpness, 3),
        "problems": file.problems,
        "notes": file.notes,
    }


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `check`."""
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="a folder of photos")
    add_base(parser)
    add_detector(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Checks, prints and returns the exit code."""
    findings = check_for(options)
    if options.json:
        say_json(findings.values())
    else:
        _print_table(findings)
    return 0 if findings.fine else 1


def check_for(options: argparse.Namespace) -> Findings:
    """Checks for the base, resolution and token of the command's options."""
    base, resolution, why = base_and_resolution(options)
    wanted = read_wanted(base, options.token)
    findings = check(options.photos, resolution, wanted, detector_of(options))
    findings.notes.insert(0, f"checked for training at {resolution} pixels ({why})")
    return findings


def _print_table(findings: Findings) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("file", "size", "stored", "problems", "notes", "caption", box=None)
    listed, further = findings.worst_first[:ROWS], findings.worst_first[ROWS:]
    for file in listed:
        size = "x".join(map(str, file.size)) if file.size else ""
        problems, notes = (escape("; ".join(texts)) for texts in (file.problems, file.notes))
        caption = escape(file.caption or "")
        table.add_row(escape(file.name), size, file.orientation, f"[red]{problems}[/]", notes, caption)
    console.print(table)
    if further:
        bad = sum(bool(file.problems) for file in further)
        told = f"... and {len(further)} more, {bad} of them with problems: --json and finetune data sheet show all"
        console.print(told, highlight=False, markup=False)
    for text in findings.problems:
        console.print(f"[red]problem[/] {escape(text)}", highlight=False)
    for text in findings.notes:
        console.print(f"note    {escape(text)}", highlight=False)
    about = f"{len(findings.files)} images in {findings.folder}: {findings.verdict}"
    console.print(about, highlight=False, markup=False)
