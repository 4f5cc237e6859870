"""Class images for prior preservation (arXiv:2208.12242 section 3.2): drawn once by the frozen base, and kept.

A set is a folder of PNGs and a manifest of what they were made of. Pictures are drawn in fixed chunks, each picture
with a seed of its own, so that the set is the same files for any number of processes and after any interruption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune.config import ClassImages
from finetune.data.photos import Photo, picture_files, read_photo, scan
from finetune.draws import generator
from finetune.errors import BadInput
from finetune.families.base import Family
from finetune.files import cache_dir, replacing, sha256, write_json
from finetune.progress import phase
from finetune.sample import draw

MANIFEST = "manifest.json"


def class_images(
    family: Family,
    prior: ClassImages,
    noun: str,
    resolution: int,
    base_hash: str,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> list[Photo]:
    """The set's first `prior.count` pictures; those that are missing are drawn (by rank r: chunks r, r + world, ...).

    A folder of the user's own pictures (without a manifest) is used as it is, all of it. `wait` is a barrier between
    the processes: the others' pictures are there after it.

    Raises:
        BadInput: the folder's manifest was made with other settings or another base: it says which.
    """
    settings = _settings(prior, noun, resolution, base_hash)
    folder = prior.folder or cache_dir() / "class-images" / f"{noun.replace(' ', '-')}-{_key(settings)}"
    if prior.folder is not None and _is_users_own(folder):
        return scan(folder)
    _refuse_stale(folder, settings)
    manifest = folder / MANIFEST
    if rank == 0 and not manifest.is_file():
        write_json(manifest, settings)
    files = [folder / f"{index:05d}.png" for index in range(prior.count)]
    chunks = [range(start, min(start + prior.batch_size, prior.count)) for start in range(0, prior.count, prior.batch_size)]
    missing = [chunk for chunk in chunks if not all(files[index].is_file() for index in chunk)]
    mine = [chunk for number, chunk in enumerate(missing) if number % world == rank]
    with phase("Class images", sum(len(chunk) for chunk in mine)) as advance:
        for chunk in mine:
            _draw_chunk(family, settings, [files[index] for index in chunk], chunk)
            advance(len(chunk), "")
    wait()
    if rank == 0:
        _finish_manifest(folder)
    return [read_photo(file) for file in files]


def seed_of(index: int) -> int:
    """A class picture's seed: a function of its number alone, so that a set can grow."""
    return int(torch.randint(2**31, (), generator=generator(0, "class image", index)))


def _settings(prior: ClassImages, noun: str, resolution: int, base_hash: str) -> dict[str, Any]:
    """What a set is made of. `chunk` counts, since the batch that a picture is drawn in sets its last bits."""
    return {
        "base": base_hash,
        "prompt": prior.prompt.replace("{noun}", noun),
        "negative": prior.negative,
        "sampler": prior.sampler,
        "steps": prior.steps,
        "guidance": prior.guidance,
        "resolution": resolution,
        "chunk": prior.batch_size,
        "seeds": "finetune.prior.seed_of(number)",
    }


def _key(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _is_users_own(folder: Path) -> bool:
    return folder.is_dir() and not (folder / MANIFEST).is_file() and bool(picture_files(folder))


def _refuse_stale(folder: Path, settings: dict[str, Any]) -> None:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    made = json.loads(manifest.read_text(encoding="utf-8"))
    changed = [key for key in settings if made.get(key) != settings[key]]
    if changed:
        raise BadInput(
            f"the class images in {folder} were made with another {', '.join(changed)} "
            f"({changed[0]}: {made.get(changed[0])!r} there, {settings[changed[0]]!r} now): remove the folder, or choose "
            "another with prior.folder=PATH"
        )


def _draw_chunk(family: Family, settings: dict[str, Any], files: list[Path], chunk: range) -> None:
    pictures = draw(
        family,
        [settings["prompt"]] * len(chunk),
        seeds=[seed_of(index) for index in chunk],
        negative=settings["negative"],
        sampler=settings["sampler"],
        steps=settings["steps"],
        guidance=settings["guidance"],
        size=settings["resolution"],
        batch_size=len(chunk),
    )
    for file, picture in zip(files, pictures, strict=True):
        with replacing(file) as temporary:
            picture.save(temporary, format="PNG")


def _finish_manifest(folder: Path) -> None:
    """Adds each picture's hash and seed to a set's manifest."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files = sorted(folder.glob("*.png"))
    manifest["pictures"] = {file.name: {"sha256": sha256(file), "seed": seed_of(int(file.stem))} for file in files}
    write_json(folder / MANIFEST, manifest)
