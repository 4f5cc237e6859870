"""Checks a folder of photos before training: facts, problems and near-duplicates, file by file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.core.errors import BadInput
from finetune.data.captions import BESIDE, LISTS, caption_files, caption_rows
from finetune.data.photos import MASK, BadImage, Photo, image_files, is_companion, open_image, opened, read_photo

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
NEAR = 6  # of 64 dHash bits may differ between near-duplicates
MOST_FRAMES = 1_000  # counting stops here


@dataclass
class File:
    """What is known about one image file.

    `size` is (width, height) in pixels as shown; `orientation` is how the file stores it. `digest` is the SHA-256 of
    the file and `fingerprint` its 64-bit dHash. `problems` need the user's attention. `notes` need none: training
    handles them by itself (it applies the EXIF rotation, puts transparency on white, ...).
    """

    path: Path
    size: tuple[int, int] | None = None
    orientation: str = ""
    caption: str | None = None
    digest: str = ""
    fingerprint: int | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The file's name, without the folder."""
        return self.path.name


@dataclass
class Findings:
    """The files of a folder, and problems and notes about the folder as a whole."""

    folder: Path
    files: list[File]
    problems: list[str]
    notes: list[str]

    @property
    def fine(self) -> bool:
        """Whether there are no problems."""
        return not self.problems and not any(file.problems for file in self.files)


def check(folder: Path, resolution: int = 512) -> Findings:
    """Checks every image of a folder for training at `resolution` pixels, and returns the findings.

    Raises:
        BadInput: there is no such folder, or no image in it.
    """
    paths = image_files(folder)
    if not paths:
        raise BadInput(f"{folder} holds no images: give the folder with the photos")
    files = [_look(path, resolution) for path in paths]
    _compare(files)
    findings = Findings(folder, files, [], _other_files(folder, paths))
    _captions(findings)
    return findings


def difference_hash(image: Image.Image) -> int:
    """Returns the image's 64-bit dHash: shrunk to 9x8 grey pixels, whether each is darker than its right neighbour."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    bits = (grey[:, :-1] < grey[:, 1:]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def _look(path: Path, resolution: int) -> File:
    file = File(path)
    try:
        photo = read_photo(path)
        upright = open_image(path)
    except BadImage as fault:
        file.problems.append(fault.reason)
        return file
    width, height = file.size = photo.size
    file.digest, file.fingerprint = photo.digest, difference_hash(upright)
    if min(width, height) < resolution:
        file.problems.append(f"low resolution: enlarged {resolution / min(width, height):.1f} times to {resolution}")
    longer = max(width, height) / min(width, height)
    if longer >= CROPPED_AWAY:
        file.problems.append(f"extreme shape: a square crop keeps {1 / longer:.0%} of it")
    _header(file, path.read_bytes())
    grey = np.asarray(upright, dtype=np.int16)
    if int(np.ptp(grey, axis=2).max()) == 0:
        file.notes.append("grey")
    return file


def _header(file: File, content: bytes) -> None:
    """Notes what the file's header says, before the image is turned upright and converted to RGB."""
    with opened(file.path, content) as image:
        file.orientation = ORIENTATIONS.get(image.getexif().get(0x0112, 1), "")
        mode = image.mode
        alpha = mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        frames = _frames(image)
    if alpha:
        file.notes.append("transparency: put on white")
    if mode.startswith(("I", "F")):
        file.notes.append("16 bits or more: scaled to 8")
    if mode == "CMYK":
        file.notes.append("CMYK: converted")
    if frames > 1:
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
    """Finds files that equal an earlier one, byte for byte or nearly so to the eye (up to NEAR dHash bits differ)."""
    seen: list[File] = []
    for file in files:
        if file.fingerprint is None:
            continue
        same = next((other for other in seen if other.digest == file.digest), None)
        distances = [(_distance(file, other), other.name) for other in seen]
        nearest = min(distances, default=None)
        if same is not None:
            file.problems.append(f"the same file as {same.name}")
        elif nearest is not None and nearest[0] <= NEAR:
            file.problems.append(f"nearly the same as {nearest[1]} ({nearest[0]} of 64 bits differ)")
        seen.append(file)


def _distance(one: File, other: File) -> int:
    assert one.fingerprint is not None
    assert other.fingerprint is not None
    return (one.fingerprint ^ other.fingerprint).bit_count()


def _captions(findings: Findings) -> None:
    """Adds each file's caption. Captions for only some files, and captions without an image, are problems."""
    names = {file.name for file in findings.files}
    try:
        found = caption_files(findings.folder, [Photo(file.path, (0, 0), "") for file in findings.files])
        rows = caption_rows(findings.folder)
    except BadInput as fault:
        findings.problems.append(str(fault))
        return
    for file in findings.files:
        file.caption = found.get(file.name)
    without = [file.name for file in findings.files if file.caption is None]
    if found.keys() & names and without:
        findings.problems.append(
            f"no caption for {', '.join(without)}, while the others have one: training uses a template for these"
        )
    orphans = sorted(rows.keys() - names)
    if orphans:
        findings.problems.append(f"captions for images that are not there: {', '.join(orphans)}")


def _other_files(folder: Path, images: list[Path]) -> list[str]:
    """Files that training does not read: videos, raw photos, captions whose name matches no image."""
    stems = {path.stem for path in images}
    others = []
    for path in sorted(folder.iterdir()):
        is_caption = path.suffix.lower() in BESIDE and path.stem in stems
        is_mask = path.name == "masks" or (path.name.lower().endswith(MASK) and path.name[: -len(MASK)] in stems)
        beside = is_caption or is_mask or is_companion(path, stems)
        if path.name.startswith(".") or beside or path in images or path.name in LISTS:
            continue
        others.append(path.name + ("/" if path.is_dir() else ""))
    return [f"not read: {', '.join(others)}"] if others else []
