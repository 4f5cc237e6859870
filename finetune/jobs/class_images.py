"""Class images for prior preservation (arXiv:2208.12242 section 3.2): drawn once by the frozen base, and kept.

A set is a folder of PNGs and a manifest of what they were made of. Pictures are drawn in fixed chunks, each picture
with a seed of its own, so that the set is the same files for any number of processes and after any interruption. What
has been drawn is never drawn over: a set that grows keeps its pictures.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune import __version__
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.files import cache_dir, replacing, sha256, write_json
from finetune.core.reading import read_json
from finetune.core.rng import generator
from finetune.data.photos import Photo, image_files, scan
from finetune.families.base import Family
from finetune.sampling.draw import draw
from finetune.training.prior import ClassImages

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
    the processes: all look at the folder before one of them changes it, and all have drawn before one goes on.

    Raises:
        BadInput: the set in the folder was made with other settings or another base (it says which), or pictures
            of it have been changed since.
    """
    settings = _settings(prior, noun, resolution, base_hash)
    folder = _folder(prior, noun, settings)
    if prior.folder is not None and _is_users_own(folder):
        return scan(folder)
    manifest = _manifest(folder, settings)
    _refuse_changed(folder, manifest["pictures"])
    files = [folder / f"{index:05d}.png" for index in range(prior.count)]
    starts = range(0, prior.count, prior.batch_size)
    chunks = [range(start, min(start + prior.batch_size, prior.count)) for start in starts]
    mine = [chunk for chunk in chunks[rank::world] if not all(files[index].is_file() for index in chunk)]
    wait()
    if rank == 0:
        write_json(folder / MANIFEST, manifest)
    with phase("Class images", sum(len(chunk) for chunk in mine)) as advance:
        for chunk in mine:
            _draw_chunk(family, settings, [files[index] for index in chunk], chunk)
            advance(len(chunk), "")
    wait()
    photos = [Photo(file, (resolution, resolution), sha256(file)) for file in files]
    if rank == 0:
        made = {photo.path.name: {"sha256": photo.digest, "seed": seed_of(n)} for n, photo in enumerate(photos)}
        write_json(folder / MANIFEST, manifest | {"pictures": manifest["pictures"] | made})
    return photos


def check_set(prior: ClassImages, noun: str, resolution: int, base_hash: str) -> None:
    """Looks at the set that `class_images` would use; changes nothing.

    Raises:
        BadInput: as `class_images`.
    """
    settings = _settings(prior, noun, resolution, base_hash)
    folder = _folder(prior, noun, settings)
    if prior.folder is not None and _is_users_own(folder):
        scan(folder)
    else:
        _refuse_changed(folder, _manifest(folder, settings)["pictures"])


def _folder(prior: ClassImages, noun: str, settings: dict[str, Any]) -> Path:
    return prior.folder or cache_dir() / "class-images" / f"{_slug(noun)}-{_key(settings)}"


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
    return folder.is_dir() and not (folder / MANIFEST).is_file() and bool(image_files(folder))


def _slug(noun: str) -> str:
    return re.sub(r"[^\w-]+", "-", noun).strip("-") or "class"


def _manifest(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The folder's manifest, or a new one; refused if it was made with other settings."""
    file = folder / MANIFEST
    if not file.is_file():
        return settings | {"toolkit": __version__, "pictures": {}}
    try:
        made = read_json(file, dict)
        images = made["pictures"]
        sound = all(isinstance(image["sha256"], str) and Path(name).name == name for name, image in images.items())
    except (BadInput, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{file} is no manifest of class images: remove {folder} to have the set drawn again"
        ) from error
    if not sound:
        raise BadInput(
            f"{file} names pictures that are not in its folder: remove {folder} to have the set drawn again"
        )
    changed = [
        f"{key} ({made.get(key)!r} there, {value!r} now)" for key, value in settings.items() if made.get(key) != value
    ]
    if changed:
        raise BadInput(
            f"the class images in {folder} were made with another {', '.join(changed)}: remove the folder, or choose "
            "another with prior.folder=PATH"
        )
    return made | {"pictures": images}


def _refuse_changed(folder: Path, recorded: dict[str, Any]) -> None:
    there = [name for name in sorted(recorded) if (folder / name).is_file()]
    names = [name for name in there if sha256(folder / name) != recorded[name]["sha256"]]
    if names:
        raise BadInput(
            f"class images in {folder} are not as they were drawn ({', '.join(names)}): remove those files and they "
            "are drawn again"
        )


def _draw_chunk(family: Family, settings: dict[str, Any], files: list[Path], chunk: range) -> None:
    images = draw(
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
    for file, image in zip(files, images, strict=True):
        if file.is_file():
            continue
        with replacing(file) as temporary:
            image.save(temporary, format="PNG")
