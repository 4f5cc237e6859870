"""The LoRA files that were dropped into the page, and what was made of them."""

from __future__ import annotations

import math
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput
from finetune.core.files import leads_out
from finetune.core.reading import read_json
from finetune.ui.lora_work import MODELS, NOTE
from finetune.ui.uploads import Uploads

ID = re.compile(r"[0-9a-f]{16}")
FORMATS = ("kohya", "diffusers", "peft")
DTYPES = ("fp16", "fp32", "bf16")
MOST_MERGED, LARGEST_WEIGHT, LARGEST_RANK = 8, 100.0, 1024


class Loras:
    """Each file lies in a folder of its own, FOLDER/loras/ID; what was made of it in another one."""

    def __init__(self, uploads: Uploads) -> None:
        self.uploads, self.home = uploads, uploads.folder / "loras"

    async def add(self, name: str, body: AsyncIterator[bytes]) -> str:
        """Takes a sent file and returns its id.

        Raises:
            BadInput: its name or size can't be taken, or it is no .safetensors file.
        """
        file = await self.uploads.take_lora(name, body)
        chosen = self.new()
        self.home.mkdir(parents=True, exist_ok=True)
        file.parent.rename(self.home / chosen)
        return chosen

    def new(self) -> str:
        """An id that is not taken."""
        return secrets.token_hex(8)

    def listed(self) -> list[dict[str, Any]]:
        """The files, the newest first."""
        folders = [each for each in self.home.iterdir() if ID.fullmatch(each.name)] if self.home.is_dir() else []
        there = sorted((each for each in folders if each.is_dir()), key=lambda each: each.stat().st_mtime)
        return [self._about(folder) for folder in reversed(there) if _held(folder)]

    def _about(self, folder: Path) -> dict[str, Any]:
        note, file = folder / NOTE, _held(folder)[0]
        said = read_json(note, dict) if note.is_file() else {"made": "", "lora": True}
        return {"id": folder.name, "name": file.name, "size": _size(file), "made": said["made"], "lora": said["lora"]}

    def path(self, chosen: str) -> Path:
        """A file, or a folder that was made.

        Raises:
            BadInput: there is none of that id.
        """
        folder = self.home / chosen
        held = _held(folder) if ID.fullmatch(chosen) and folder.is_dir() else []
        if not held or leads_out(held[0], self.home):
            raise BadInput("this file is not here any more: load the page again")
        return held[0]

    def remove(self, chosen: str) -> None:
        """Removes a file.

        Raises:
            BadInput: there is none of that id.
        """
        self.path(chosen)
        shutil.rmtree(self.home / chosen)

    def conversion(self, chosen: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the chore that converts a file is given.

        Raises:
            BadInput: there is no such file, format or precision.
        """
        file, to = self.path(chosen), _one_of(values.get("to"), FORMATS)
        dtype = values.get("dtype")
        given = {"file": str(file), "to": to, "name": file.stem, "dtype": dtype and _one_of(dtype, DTYPES)}
        return given | {"note": {"made": f"{file.name} as {to}", "lora": True}}

    def merging(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the chore that merges files is given.

        Raises:
            BadInput: a file, a weight, the rank or the format can't be used.
        """
        given, to = values.get("files"), _one_of(values.get("to"), (*FORMATS, *MODELS))
        if not isinstance(given, list) or not 1 <= len(given) <= MOST_MERGED or (len(given) < 2 and to not in MODELS):
            raise BadInput(f"choose 2 to {MOST_MERGED} files to merge")
        files = [_weighted(self, pair) for pair in given]
        rank = values.get("rank")
        if rank is not None and (type(rank) is not int or not 1 <= rank <= LARGEST_RANK or to in MODELS):
            raise BadInput(f"the rank is {rank!r:.20}: give 1 to {LARGEST_RANK} for a LoRA, or leave it out")
        words = " + ".join(f"{weight:g} × {path.name}" for path, weight in files)
        name = re.sub(r"[^\w+-]+", "-", "+".join(path.stem for path, _ in files))[:80]
        pairs = [(str(path), weight) for path, weight in files]
        note = {"made": f"a model with {words}" if to in MODELS else words, "lora": to not in MODELS}
        return {"files": pairs, "to": to, "name": name, "rank": rank, "note": note}


def _held(folder: Path) -> list[Path]:
    """The file or folder in a folder of its own, and not the note beside it; of a folder with one file, the file."""
    found = [each for each in folder.iterdir() if not each.name.startswith(".")]
    while len(found) == 1 and found[0].is_dir() and not found[0].is_symlink():
        inside = list(found[0].iterdir())
        if len(inside) != 1:
            break
        found = inside
    return found


def _weighted(loras: Loras, pair: Any) -> tuple[Path, float]:
    if not isinstance(pair, list) or len(pair) != 2 or type(pair[1]) not in (int, float):
        raise BadInput("give each file with a weight, such as 0.7")
    weight = float(pair[1])
    if not math.isfinite(weight) or not 0 < abs(weight) <= LARGEST_WEIGHT:
        raise BadInput(f"the weight {weight:g} can't be used: give a number other than 0, such as 0.7")
    return loras.path(str(pair[0])), weight


def _one_of(value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise BadInput(f"{value!r:.40} is not one of {', '.join(known)}: choose one of them")
    return str(value)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
