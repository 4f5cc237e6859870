"""What chaos.py does to a run's files between two kills, and what a resume may then do.

Each resume either ends with the unbroken run's bits, or refuses with the name of what changed: nothing else.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Undo = Callable[[], None]


@dataclass(frozen=True)
class Place:
    """Where a run works: its folder, its cache, and the photos and the base that it reads."""

    run: Path
    cache: Path
    photos: Path
    base: Path


@dataclass(frozen=True)
class Tampering:
    """`files`: those that it may be done to. `change`: bytes -> other bytes (None: the file is removed).

    `refused`: the resume must refuse, and its sentence has this text; empty: it goes on, or names the file.
    """

    name: str
    files: Callable[[Place], list[Path]]
    change: Callable[[bytes, random.Random], bytes | None]
    refused: str = ""

    def apply(self, place: Place, dice: random.Random) -> tuple[Path, Undo] | None:
        """The changed file and how to undo it; None where there is none yet."""
        found = sorted(self.files(place))
        if not found:
            return None
        file = dice.choice(found)
        before = file.read_bytes()
        after = self.change(before, dice)
        if after == before:
            return None
        if after is None:
            file.unlink()
        else:
            file.write_bytes(after)

        def undo() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(before)

        return file, undo


def flip(content: bytes, dice: random.Random) -> bytes:
    data = bytearray(content)
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(data)


def cut(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content))] if content else content


def emptied(content: bytes, dice: random.Random) -> bytes:
    return b""


def a_list(content: bytes, dice: random.Random) -> bytes:
    return b"[1, 2]"


def binary(content: bytes, dice: random.Random) -> bytes:
    return bytes(dice.randrange(256) for _ in range(200))


def removed(content: bytes, dice: random.Random) -> None:
    return None


def end_flipped(content: bytes, dice: random.Random) -> bytes:
    """A bit of the last tensor, so that the header stays whole."""
    return content[:-1] + bytes([content[-1] ^ 1]) if content else content


def _newest(place: Place) -> list[Path]:
    newest = sorted((place.run / "checkpoints").glob("step-*"))[-1:]
    return [file for folder in newest for file in folder.iterdir()]


def _one(name: str) -> Callable[[Place], list[Path]]:
    return lambda place: [file for file in (place.run / name,) if file.is_file()]


def _cached(kind: str) -> Callable[[Place], list[Path]]:
    return lambda place: list((place.cache / kind).rglob("*.safetensors"))


def _photos(place: Place) -> list[Path]:
    return list(place.photos.glob("*.png"))


def _repainted(content: bytes, dice: random.Random) -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (256, 256), dice.choice(["red", "blue", "teal"])).save(out, "PNG")
    return out.getvalue()


CHANGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flipped": flip, "cut": cut, "emptied": emptied, "a list": a_list, "binary": binary, "removed": removed,
}  # fmt: skip
WRITTEN = ("run.json", "inputs.json", "metrics.jsonl", "status.json", "exports.json", "adapter/trained.safetensors",
           "adapter/manifest.json", "report.html")  # fmt: skip
TAMPERINGS = (
    *(Tampering(f"checkpoint {name}", _newest, change) for name, change in CHANGES.items()),
    *(Tampering(f"latents {name}", _cached("latents"), change) for name, change in CHANGES.items()),
    *(Tampering(f"prompts {name}", _cached("prompts"), change) for name, change in CHANGES.items()),
    Tampering("latents' last bit", _cached("latents"), end_flipped),
    *(
        Tampering(f"file-hashes.json {name}", lambda place: list(place.cache.glob("file-hashes.json")), change)
        for name, change in CHANGES.items()
        if name != "flipped"  # another hash of the right form: only --rehash finds that
    ),
    *(
        Tampering(f"{file} {name}", _one(file), change)
        for file in WRITTEN
        for name, change in CHANGES.items()
        if not (file == "inputs.json" and name in ("removed", "flipped"))
    ),
    Tampering("a photo repainted", _photos, _repainted, "is not the same image"),
    Tampering("a photo removed", _photos, removed, "is gone"),
    Tampering(
        "the base's weights", lambda place: list((place.base / "unet").glob("*.safetensors")), end_flipped,
        "the base's file unet/diffusion_pytorch_model.safetensors changed",
    ),
)  # fmt: skip


def copied_place(work: Path, number: int) -> Place:
    """Photos and base of a run's own, which may be tampered with."""
    own = work / f"inputs-{number}"
    if not own.is_dir():
        shutil.copytree(work / "photos", own / "photos")
        shutil.copytree(work / "base", own / "base")
    return Place(work / f"run-{number}", work / "caches" / f"run-{number}", own / "photos", own / "base")
