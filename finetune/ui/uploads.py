"""The folder that belongs to the page: photos and files that people send. Nothing is written outside of it."""

from __future__ import annotations

import re
import secrets
import shutil
import unicodedata
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

from finetune.core.errors import BadInput
from finetune.core.files import find_link_out, leads_out, replacing, sha256, write_text

LARGEST_PHOTO = 200_000_000  # bytes
LARGEST_CAPTION = 100_000
LARGEST_ZIP = 4_000_000_000
LARGEST_LORA = 4_000_000_000
MOST_FILES = 2_000  # in one set
SPARE = 500_000_000  # bytes that stay free on the disk
LONGEST_NAME = 120  # characters
MASK = ".mask.png"  # as in finetune.data.photos, which loads numpy: a test compares them
JOINER = "\u200d"  # inside emojis; the only invisible character that may be in a name
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # Windows
SET_ID = re.compile(r"photos-[0-9a-f]{8}")


def safe_name(name: str) -> str:
    """Returns `name` if it can be the name of a file on every system, and leads nowhere.

    Raises:
        BadInput: it can't.
    """
    plain = unicodedata.normalize("NFC", name)
    fault = _fault_of(plain)
    if fault:
        raise BadInput(f"the file name {_printable(plain)!r} {fault}: rename the file, and send it again")
    return plain


def _fault_of(name: str) -> str:
    if not name.strip() or name.startswith(".") or name.endswith((".", " ")):
        return "is empty, or begins or ends with a dot or a space"
    if len(name) > LONGEST_NAME:
        return f"has {len(name)} characters, more than {LONGEST_NAME}"
    if set(name) & set('/\\<>:"|?*'):
        return 'has one of / \\ < > : " | ? * in it'
    if any(unicodedata.category(sign).startswith(("C", "Zl", "Zp")) and sign != JOINER for sign in name):
        return "has an invisible character in it"
    return "is reserved on Windows" if RESERVED.fullmatch(name) else ""


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text[:60])


class Uploads:
    """The sets of photos in FOLDER/photos, what was left out of them, and files that were dropped for a look."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def new_set(self) -> str:
        """Makes an empty set and returns its name."""
        name = f"photos-{secrets.token_hex(4)}"
        (self.folder / "photos" / name).mkdir(parents=True)
        return name

    def photos_of(self, name: str) -> Path:
        """The folder of a set.

        Raises:
            BadInput: there is no such set.
        """
        folder = self.folder / "photos" / name
        if not SET_ID.fullmatch(name) or not folder.is_dir() or leads_out(folder, self.folder):
            raise BadInput(f"there are no photos called {_printable(name)!r} here: send them again")
        return folder

    def left_out_of(self, name: str) -> Path:
        """The folder with what a person left out of a set."""
        return self.folder / "left-out" / self.photos_of(name).name

    def small_of(self, name: str) -> Path:
        """The folder with small copies of a set's photos, which browsers can show."""
        return self.folder / "small" / self.photos_of(name).name

    def sets(self) -> list[str]:
        """The names of all sets that hold something, the newest first."""
        home = self.folder / "photos"
        found = [each for each in home.iterdir() if SET_ID.fullmatch(each.name)] if home.is_dir() else []
        filled = [each for each in found if each.is_dir() and any(each.iterdir())]
        return [each.name for each in sorted(filled, key=lambda each: each.stat().st_mtime, reverse=True)]

    def count(self, name: str) -> int:
        """The number of photos of a set, by the names of its files.

        Raises:
            BadInput: there is no such set.
        """
        beside = (".txt", ".caption", ".jsonl", ".csv", MASK)
        return sum(not file.name.lower().endswith(beside) for file in self.photos_of(name).iterdir())

    async def add(self, name: str, file_name: str, body: AsyncIterator[bytes]) -> str:
        """Writes a sent photo or caption into a set. Another file of the same name stays: the new one gets a number.

        Returns:
            The name that it has now.

        Raises:
            BadInput: its name or size can't be taken, it is not a photo or a caption, or the set or the disk is full.
        """
        from finetune.data.captions import BESIDE
        from finetune.data.sources.base import is_usable

        folder, wanted = self.photos_of(name), safe_name(file_name)
        if not is_usable(wanted):
            raise BadInput(f"{wanted!r} is not a photo, a caption (.txt) or a zip file of them: leave it out")
        if sum(1 for _ in folder.iterdir()) >= MOST_FILES:
            raise BadInput(f"these are more than {MOST_FILES} files: train on fewer photos")
        is_caption = Path(wanted).suffix.lower() in BESIDE
        arrived = await self._receive(wanted, body, LARGEST_CAPTION if is_caption else LARGEST_PHOTO)
        try:
            return place_beside(arrived, folder, wanted)
        finally:
            arrived.unlink(missing_ok=True)

    async def take_zip(self, file_name: str, body: AsyncIterator[bytes]) -> Path:
        """Writes a sent zip file and returns where it is; the caller removes it.

        Raises:
            BadInput: its name or its size can't be taken.
        """
        return await self._receive(safe_name(file_name), body, LARGEST_ZIP)

    async def take_lora(self, file_name: str, body: AsyncIterator[bytes]) -> Path:
        """Writes a sent LoRA into a folder of its own and returns the file; the caller removes the folder.

        Raises:
            BadInput: its name or its size can't be taken, or it is not a .safetensors file.
        """
        wanted = safe_name(file_name)
        if not wanted.lower().endswith(".safetensors"):
            raise BadInput(f"{wanted!r} is not a .safetensors file: give a LoRA in that format")
        arrived = await self._receive(wanted, body, LARGEST_LORA)
        folder = self.folder / "looked-at" / secrets.token_hex(8)
        folder.mkdir(parents=True)
        return arrived.rename(folder / wanted)

    def packed(self, folder: Path) -> Path:
        """A zip file of a folder, which the caller removes.

        Raises:
            BadInput: a link in it leads out of it, or the disk is nearly full.
        """
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if find_link_out(folder) is not None:
            raise BadInput("this folder has a link out of it: it is not sent")
        if shutil.disk_usage(self.folder).free < SPARE + sum(file.stat().st_size for file in files):
            raise BadInput("the disk is nearly full, so the folder could not be packed: free some space")
        target = self.folder / "incoming" / secrets.token_hex(8)
        with replacing(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as held:
            for file in files:
                held.write(file, f"{folder.name}/{file.relative_to(folder).as_posix()}")
        return target

    async def _receive(self, name: str, body: AsyncIterator[bytes], limit: int) -> Path:
        """Writes a body to a file with a name that nobody knows, and returns it."""
        target, size = self.folder / "incoming" / secrets.token_hex(8), 0
        with replacing(target) as temporary, temporary.open("wb") as file:
            async for part in body:
                size += len(part)
                if size > limit:
                    raise BadInput(f"{name!r} is larger than {limit / 1e6:g} MB: make it smaller, or leave it out")
                if shutil.disk_usage(self.folder).free < SPARE + len(part):
                    raise BadInput(f"the disk is nearly full, so {name!r} was not kept: free some space")
                file.write(part)
            file.flush()
        if not size:
            target.unlink()
            raise BadInput(f"{name!r} is empty: send the file again")
        return target

    def left_out(self, name: str) -> list[str]:
        """The photos that were left out of a set."""
        folder = self.left_out_of(name)
        files = list(folder.iterdir()) if folder.is_dir() else []
        stems = {file.stem for file in files}
        return sorted(file.name for file in files if not any(_belongs(file, stem) for stem in stems))

    def leave_out(self, name: str, file_name: str, out: bool) -> None:
        """Moves a photo, with its captions and masks, out of the set, or back.

        Raises:
            BadInput: the set has no such photo.
        """
        here, there = self.photos_of(name), self.left_out_of(name)
        source, target = (here, there) if out else (there, here)
        file = one_of(source, file_name)
        target.mkdir(parents=True, exist_ok=True)
        for each in [file, *(other for other in source.iterdir() if _belongs(other, file.stem))]:
            each.replace(target / each.name)

    def caption(self, name: str, file_name: str, text: str) -> None:
        """Writes the caption beside a photo; an empty one is removed.

        Raises:
            BadInput: the set has no such photo, or the caption is too long.
        """
        file = one_of(self.photos_of(name), file_name).with_suffix(".txt")
        words = " ".join(text.split())
        if len(words) > 2_000:
            raise BadInput(f"the caption has {len(words)} characters: write at most 2000")
        if words:
            write_text(file, words + "\n")
        else:
            file.unlink(missing_ok=True)


def one_of(folder: Path, name: str) -> Path:
    """The file of that name in a folder; looked up among its files, so that a name leads nowhere else."""
    found = [file for file in folder.iterdir() if file.name == name and file.is_file()] if folder.is_dir() else []
    if not found or found[0].is_symlink():
        raise BadInput(f"there is no photo {_printable(name)!r} here: load the page again")
    return found[0]


def _belongs(file: Path, stem: str) -> bool:
    """Whether a file is the caption, the mask or another companion of the photo `stem`, by its name."""
    from finetune.data.captions import BESIDE
    from finetune.data.photos import is_companion

    own = file.stem == stem and file.suffix.lower() in BESIDE
    return own or file.name.lower() == f"{stem}{MASK}".lower() or is_companion(file, {stem})


def place_beside(arrived: Path, folder: Path, name: str) -> str:
    """Moves a file into a folder under its name, or with a number if another file has it. The same bytes stay one."""
    stem, suffix = Path(name).stem, Path(name).suffix
    taken = {each.name.lower(): each for each in folder.iterdir()}
    number, wanted = 1, name
    while wanted.lower() in taken:
        if sha256(taken[wanted.lower()]) == sha256(arrived):
            return taken[wanted.lower()].name
        number += 1
        wanted = f"{stem}-{number}{suffix}"
    arrived.replace(folder / wanted)
    return wanted
