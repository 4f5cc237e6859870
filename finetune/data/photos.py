"""Finds the photos of a folder, and says what each one is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from PIL import Image

from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.parallel import mapped
from finetune.data.colours import flat_rgb, is_converted
from finetune.data.decoding import BadImage, image_bytes, image_of, shown, upright
from finetune.data.known_photos import KnownPhotos, file_state

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
APPLE = {".heic", ".heif", ".hif"}  # pillow-heif reads those
LAST = {".avif", ".jfif", ".jpe"} | APPLE  # of several companions of one photo, one with another suffix is taken
SUFFIXES_SHOWN = ", ".join(sorted(SUFFIXES | APPLE))
MASK = ".mask.png"  # NAME.mask.png says which part of the photo NAME is the subject
COMPANIONS = ("depth", "before")  # NAME.depth.png belongs to the photo NAME and is not a photo itself
MIN_SIDE = 16  # pixels: a smaller image holds too little to learn from
MAX_ASPECT = 20  # a longer strip, resized to a shorter side of 512, would not fit into memory


class Stored(Protocol):
    """An image that is not a file of its own, such as one in a data set."""

    def read(self) -> bytes:
        """Returns its bytes, as they would be in a file.

        Raises:
            BadInput: they can't be read any more.
        """


@dataclass(frozen=True, slots=True)
class Photo:
    """An image file. `size` is (width, height) in pixels after the EXIF rotation; `digest` is its SHA-256.

    `recoloured`: its ICC profile is not sRGB, so its values are converted when it is read. `stored`: where the bytes
    are, if they are not a file of their own. `path` then only names it.
    """

    path: Path
    size: tuple[int, int]
    digest: str
    recoloured: bool = False
    stored: Stored | None = field(default=None, compare=False, repr=False)

    def open(self) -> Image.Image:
        """Returns the photo as `open_image` does.

        Raises:
            BadImage, BadInput: as `content`; or it can't be decoded.
        """
        return image_of(self.path, self.content())

    def content(self) -> bytes:
        """Returns its bytes, as they are in a file.

        Raises:
            BadImage: it can't be read.
            BadInput: it is not what `digest` says any more. What is made of it is kept by that, for every later run.
        """
        found = image_bytes(self.path) if self.stored is None else self.stored.read()
        if hashlib.sha256(found).hexdigest() != self.digest:
            raise BadInput(f"{shown(self.path)} changed since it was first read: start the run again", path=self.path)
        return found


@dataclass(frozen=True)
class Scan:
    """The images of a folder: the usable photos, and an error for each other file."""

    photos: list[Photo]
    bad: list[BadImage]

    @property
    def names(self) -> str:
        """The names of the bad files, each with its reason."""
        return ", ".join(f"{shown(fault.file.name)} ({fault.reason})" for fault in self.bad)

    @property
    def sentence(self) -> str:
        """A sentence with the number of bad files, their names and reasons."""
        return f"{len(self.bad)} of {len(self.photos) + len(self.bad)} files can't be used: {self.names}"


def image_files(folder: Path) -> list[Path]:
    """Returns the image files of a folder, sorted by name, without hidden files, masks and companions.

    Raises:
        BadInput: there is no such folder, or it is a file.
    """
    if folder.is_file():
        raise BadInput(f"{folder} is a file: give the folder that holds the photos", path=folder)
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}: give the folder that holds the photos", path=folder)
    entries = (file for file in folder.iterdir() if not file.name.startswith("."))
    files = sorted(
        file for file in entries if file.is_file() or file.is_symlink()
    )  # a broken link is reported as a bad photo
    images = [file for file in files if file.suffix.lower() in SUFFIXES | APPLE]
    images = [file for file in images if not file.name.lower().endswith(MASK)]
    stems = {file.stem for file in images}
    return [file for file in images if not is_companion(file, stems)]


def no_images(source: Path, folder: Path) -> BadInput:
    """The error for a `source` whose `folder` holds none. It names a folder in it that does."""
    return BadInput(f"{source} holds no images: {_where_photos_are(folder)}", path=source)


def _folders_in(folder: Path) -> list[Path]:
    try:
        return [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []


def _has_images(folder: Path) -> bool:
    try:
        return bool(image_files(folder))
    except OSError:  # a folder that may not be read is no place to point at
        return False


def is_companion(file: Path, stems: set[str]) -> bool:
    """Returns whether an image belongs to a photo named in `stems`, as NAME.depth.png belongs to NAME."""
    name, _, kind = file.stem.rpartition(".")
    return kind in COMPANIONS and name in stems


def companion(photo: Path, kind: str) -> Path | None:
    """Returns the file NAME.`kind`.png (or another image suffix) beside the photo NAME, or None."""
    suffixes = sorted(SUFFIXES | APPLE, key=lambda suffix: (suffix in LAST, suffix))
    files = (photo.with_name(f"{photo.stem}.{kind}{suffix}") for suffix in suffixes)
    return next((file for file in files if file.is_file()), None)


def mask_beside(photo: Path) -> Path | None:
    """Returns the mask file of a photo, NAME.mask.png or masks/NAME.png, or None."""
    places = (photo.with_name(f"{photo.stem}{MASK}"), photo.parent / "masks" / f"{photo.stem}.png")
    return next((place for place in places if place.is_file()), None)


def scan(folder: Path) -> list[Photo]:
    """Returns the photos of a folder, sorted by name. Every image file must be usable.

    Raises:
        BadInput: there is no such folder, no image in it, or files that can't be used (the message names them all).
    """
    found = scan_lenient(folder)
    if found.bad:
        raise BadInput(f"in {folder} {found.sentence}; fix or remove them", path=folder)
    return found.photos


def scan_lenient(folder: Path, workers: int = 1) -> Scan:
    """Opens and decodes every image of a folder once, in so many threads, and returns the good and the bad ones.

    Those that an earlier scan decoded, and whose files did not change, are not opened (`finetune.data.known_photos`).

    Raises:
        BadInput: there is no such folder, or no usable image in it.
    """
    files = image_files(folder)
    if not files:
        raise BadInput(f"{folder} holds no images ({SUFFIXES_SHOWN}): {_where_photos_are(folder)}", path=folder)
    known = KnownPhotos(folder)
    seen: dict[Path, Photo | BadImage] = {file: Photo(file, *facts) for file in files if (facts := known.find(file))}
    unseen = [file for file in files if file not in seen]
    with phase("Photos", len(files), "photos") as advance:
        advance(len(seen), "")
        for file, photo in zip(unseen, mapped(partial(_read_and_known, known), unseen, workers), strict=True):
            seen[file] = photo
            advance(1, "")
    known.write()
    found = Scan(
        [photo for file in files if isinstance(photo := seen[file], Photo)],
        [fault for file in files if isinstance(fault := seen[file], BadImage)],
    )
    if not found.photos:
        raise BadInput(f"{folder} holds no images that can be used: {found.names}; fix them", path=folder)
    return found


def _read_and_known(known: KnownPhotos, file: Path) -> Photo | BadImage:
    """One photo of a scan, or why it can't be used."""
    before = file_state(file)
    try:
        photo = read_photo(file)
    except BadImage as fault:
        return fault
    known.add(file, before, (photo.size, photo.digest, photo.recoloured))
    return photo


def _where_photos_are(folder: Path) -> str:
    """What to do about a folder without images. It names a folder in it, or one level deeper, that has some."""
    folders = _folders_in(folder)
    deeper = [*folders, *(each for place in folders for each in _folders_in(place))]
    inside = next((place.relative_to(folder).as_posix() for place in deeper if _has_images(place)), None)
    hint = f"; there are some in its folder {shown(inside)!r}" if inside is not None else ""
    return f"give the folder with the photos{hint}"


def read_photo(file: Path) -> Photo:
    """Reads and decodes one file, and returns its size and hash.

    Raises:
        BadImage: it can't be used as a photo.
    """
    _check_name(file)
    return photo_of(file, image_bytes(file))


def read_image(file: Path) -> tuple[Photo, Image.Image]:
    """Like `read_photo`, and also returns the image as `open_image` does, decoded once.

    Raises:
        BadImage: it can't be used as a photo.
    """
    _check_name(file)
    content = image_bytes(file)
    decoded = upright(file, content)
    return _sound(file, content, decoded), flat_rgb(decoded, "white")


def _check_name(file: Path) -> None:
    if shown(file) != str(file):
        raise BadImage(file, "its name is not UTF-8: rename it")


def photo_of(file: Path, content: bytes, stored: Stored | None = None) -> Photo:
    """Decodes the bytes of an image, and returns its size and hash. `file` names it in messages.

    Raises:
        BadImage: it can't be used as a photo.
    """
    return replace(_sound(file, content, upright(file, content)), stored=stored)


def _sound(file: Path, content: bytes, decoded: Image.Image) -> Photo:
    width, height = decoded.size
    if min(width, height) < MIN_SIDE:
        raise BadImage(file, f"{width}x{height} pixels is too small")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(file, f"{width}x{height} is more than {MAX_ASPECT} times as long as wide: crop it")
    return Photo(file, (width, height), hashlib.sha256(content).hexdigest(), is_converted(decoded))
