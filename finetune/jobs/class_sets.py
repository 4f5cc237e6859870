"""Class images for prior preservation (arXiv:2208.12242 section 3.2): the frozen base draws them once.

A set is a folder of PNG files with a manifest of the settings that they were drawn with. Images are drawn in fixed
chunks, and each image has its own seed. So the files are the same for any number of processes and after any
interruption. Existing images are never drawn again: a larger set keeps the images of the smaller one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import floor
from pathlib import Path
from typing import Any, ClassVar

import torch

from finetune import __version__
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.files import cache_dir, replacing, write_json
from finetune.core.processes import ALONE, Processes
from finetune.core.reading import read_json
from finetune.core.rng import generator
from finetune.data.photos import Photo, image_files, scan
from finetune.families.base import Family
from finetune.families.digests import file_hashes
from finetune.jobs.ready_made import unpack_images
from finetune.sampling.draw import draw
from finetune.sampling.settings import Sampling
from finetune.training.priors.class_images import ClassImages

MANIFEST = "manifest.json"
PRECISION = "precision"  # in a manifest; older versions did not write it


@dataclass(frozen=True)
class ClassSet:
    """The class images of one noun: what to draw, at `resolution` pixels a side, with the base of this hash.

    `captions`: if there are any, image n is drawn for number n % len(captions) of them instead of the class prompt.
    `precision`: what the base computes in. `ready_made`: a file with some of the images (`finetune.jobs.ready_made`).
    """

    title: ClassVar[str] = "Class images"  # of the phase that draws them

    prior: ClassImages
    noun: str
    resolution: int
    base_hash: str
    particulars: Mapping[str, Any] = field(default_factory=dict)  # `Drawing.particulars` of the base
    captions: tuple[str, ...] = ()
    precision: str = "fp32"
    ready_made: Path | None = None

    @cached_property
    def sampling(self) -> Sampling:
        """The settings that the images are drawn with; one batch is one chunk."""
        prior = self.prior
        return Sampling(prior.negative, prior.sampler, prior.steps, prior.guidance, self.resolution, prior.batch_size)

    @cached_property
    def prompt(self) -> str:
        """The class prompt, with the noun filled in."""
        return self.prior.prompt.replace("{noun}", self.noun)

    def prompt_of(self, index: int) -> str:
        """Returns the prompt of image number `index`."""
        return self.captions[index % len(self.captions)] if self.captions else self.prompt

    @property
    def asked(self) -> dict[str, Any]:
        """The prompts, for the manifest."""
        return {"prompts": list(self.captions)} if self.captions else {"prompt": self.prompt}

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """The settings that decide the images, for the manifest. The batch size (`chunk`) affects the last bits."""
        return {
            "base": self.base_hash,
            **self.asked,
            "negative": self.prior.negative,
            "sampler": self.prior.sampler,
            "steps": self.prior.steps,
            "guidance": self.prior.guidance,
            "resolution": self.resolution,
            "chunk": self.prior.batch_size,
            PRECISION: self.precision,
            "seeds": "finetune.prior.seed_of(number)",
            **({"drawing": dict(self.particulars)} if self.particulars else {}),
        }

    @cached_property
    def folder(self) -> Path:
        """The user's folder, or one in the cache with a hash of `made_of` in its name."""
        made_of = dict(self.made_of)
        if self.precision == "fp32":  # as versions named it that knew of no other, so that their sets are found
            del made_of[PRECISION]
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
        return self.prior.folder or cache_dir() / "class-images" / f"{self.name}-{key}"

    @property
    def name(self) -> str:
        """How the folder's name begins, for people."""
        return "captions" if self.captions else _slug(self.noun)

    def is_users_own(self) -> bool:
        """Returns whether the folder holds the user's own images: images without a manifest."""
        if self.prior.folder is None or not self.folder.is_dir():
            return False
        return not (self.folder / MANIFEST).is_file() and bool(image_files(self.folder))


@dataclass(frozen=True)
class OtherSet(ClassSet):
    """Images of everything else (`prior.others`), for `captions` in turn, and a share `empty` for the empty prompt.

    Nothing of the subject is in it, so all runs with this base and resolution use the same images.
    """

    title: ClassVar[str] = "Other images"

    empty: float = 0.0

    def prompt_of(self, index: int) -> str:
        """Returns the prompt of image number `index`: empty ones are spread evenly."""
        before, after = self._empty_before(index), self._empty_before(index + 1)
        return "" if after > before or not self.captions else self.captions[(index - before) % len(self.captions)]

    def _empty_before(self, index: int) -> int:
        return floor(index * Fraction(str(self.empty)))

    @property
    def asked(self) -> dict[str, Any]:
        """The prompts, for the manifest. The number of images is not in it, so that a set can grow."""
        return {"prompts": list(self.captions), "empty": self.empty}

    @property
    def name(self) -> str:
        """How the folder's name begins, for people."""
        return "others"


def class_images(family: Family, wanted: ClassSet, processes: Processes = ALONE) -> list[Photo]:
    """Returns the first `prior.count` images of the set, and draws those that are missing.

    Every process must call this: the process with rank r draws chunks r, r + world, and so on. All processes read the
    folder before any of them changes it, and none continues until all have finished drawing. A folder with the user's
    own images (without a manifest) is used unchanged, and all of its images are returned.

    Raises:
        BadInput: the set was drawn with other settings or another base (the message names them), or its images were
            changed afterwards.
    """
    if wanted.is_users_own():
        return _users_own(wanted)
    folder, count, size = wanted.folder, wanted.prior.count, wanted.prior.batch_size
    manifest = _manifest(wanted)
    _refuse_changed(folder, manifest["pictures"])
    files = [folder / f"{index:05d}.png" for index in range(count)]
    if wanted.ready_made is not None:
        processes.wait()
        if processes.rank == 0:  # what was drawn here once has the hash of that, and is drawn again
            names = [file.name for file in files if file.name not in manifest["pictures"]]
            unpack_images(wanted.ready_made, folder, wanted.made_of, names)
        processes.wait()
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    mine = chunks[processes.rank :: processes.world]
    mine = [chunk for chunk in mine if not all(files[index].is_file() for index in chunk)]
    processes.wait()
    if processes.rank == 0:
        write_json(folder / MANIFEST, manifest)
    if mine:
        _draw_chunks(family, wanted, files, mine)
    processes.wait()
    photos = [Photo(file, (wanted.resolution, wanted.resolution), found) for file, found in file_hashes(files).items()]
    if processes.rank == 0:
        made = {photo.path.name: {"sha256": photo.digest, "seed": seed_of(n)} for n, photo in enumerate(photos)}
        manifest = _manifest(wanted)  # again: another run may have drawn more of the set meanwhile
        write_json(folder / MANIFEST, manifest | {"pictures": manifest["pictures"] | made})
    return photos


def check_set(wanted: ClassSet, photos: Sequence[Photo] = ()) -> None:
    """Checks the set that `class_images` would use, without changing it.

    `photos`: those of the subjects, none of which may be in the set.

    Raises:
        BadInput: as `class_images`; or the user's own images hold photos of a subject.
    """
    if not wanted.is_users_own():
        _refuse_changed(wanted.folder, _manifest(wanted)["pictures"])
        return
    subjects = {photo.digest for photo in photos}
    shared = [photo.path.name for photo in _users_own(wanted) if photo.digest in subjects]
    if shared:
        raise BadInput(
            f"prior.folder={wanted.folder} holds photos of the subject ({', '.join(shared[:3])}"
            f"{', ...' if len(shared) > 3 else ''}), which would make the whole class look like it: give images of "
            f"other things of its kind, or leave prior.folder out and the base draws them"
        )


def _users_own(wanted: ClassSet) -> list[Photo]:
    if wanted.captions:
        raise BadInput(
            f"prior.folder {wanted.folder} holds images of your own, but prior.prompt has {{caption}}, and nothing "
            "says which caption each image fits: leave prior.folder out, or write a prompt that fits them all"
        )
    return scan(wanted.folder)


def seed_of(index: int) -> int:
    """Returns the seed of class image number `index`. It depends only on the number, so that a set can grow."""
    return int(torch.randint(2**31, (), generator=generator(0, "class image", index)))


def _slug(noun: str) -> str:
    return re.sub(r"[^\w-]+", "-", noun).strip("-") or "class"


def _manifest(wanted: ClassSet) -> dict[str, Any]:
    """The folder's manifest, or a new one. Refuses a manifest with other settings."""
    folder, settings = wanted.folder, wanted.made_of
    file = folder / MANIFEST
    if not file.is_file():
        return settings | {"toolkit": __version__, "pictures": {}}
    try:
        made = read_json(file, dict)
        images = made["pictures"]
        sound = all(isinstance(image["sha256"], str) and Path(name).name == name for name, image in images.items())
    except (BadInput, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{file} is not a manifest of class images: remove {folder}, and the set is drawn again"
        ) from error
    if not sound:
        raise BadInput(f"{file} names images outside its folder: remove {folder}, and the set is drawn again")
    known = {key: value for key, value in settings.items() if key != PRECISION or key in made}
    changed = [
        f"{key} ({made.get(key)!r} there, {value!r} now)" for key, value in known.items() if made.get(key) != value
    ]
    if changed:
        raise BadInput(
            f"the class images in {folder} were drawn with another {', '.join(changed)}: remove the folder, or choose "
            "another with prior.folder=PATH"
        )
    return made | {"pictures": images}


def _refuse_changed(folder: Path, recorded: dict[str, Any]) -> None:
    there = [folder / name for name in sorted(recorded) if (folder / name).is_file()]
    names = [file.name for file, found in file_hashes(there).items() if found != recorded[file.name]["sha256"]]
    if names:
        raise BadInput(
            f"class images in {folder} were changed after they were drawn ({', '.join(names)}): remove those files, "
            "and they are drawn again"
        )


def _draw_chunks(family: Family, wanted: ClassSet, files: list[Path], chunks: list[range]) -> None:
    """Another run may draw the same set now. So each begins at its own place, and looks again before each chunk."""
    first = os.getpid() % len(chunks)
    with phase(wanted.title, sum(len(chunk) for chunk in chunks), "images") as advance:
        for chunk in [*chunks[first:], *chunks[:first]]:
            if not all(files[index].is_file() for index in chunk):
                _draw_chunk(family, wanted, [files[index] for index in chunk], chunk)
            advance(len(chunk), "")


def _draw_chunk(family: Family, wanted: ClassSet, files: list[Path], chunk: range) -> None:
    seeds = [seed_of(index) for index in chunk]
    images = draw(family, [wanted.prompt_of(index) for index in chunk], wanted.sampling, seeds=seeds)
    for file, image in zip(files, images, strict=True):
        if file.is_file():
            continue
        with replacing(file) as temporary:
            image.save(temporary, format="PNG")
