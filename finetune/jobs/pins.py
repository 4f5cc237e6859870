"""What a run is made from, by content: recorded when it begins, compared when it goes on."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.data.samplers import Sample
from finetune.data.settings import hub_id
from finetune.families.digests import base_files, file_hashes
from finetune.jobs.dataset import held_out_photos
from finetune.jobs.prepare import Prepared
from finetune.jobs.run_record import LISTED
from finetune.jobs.subjects import Subject
from finetune.runs.inputs import (
    Accepted,
    InputsRecord,
    PinnedPhoto,
    PinnedTable,
    RunInputs,
    caption_pin,
    changes,
    in_recorded_order,
    read_inputs,
    refusal,
    told_images,
    write_inputs,
)
from finetune.training.accelerate import resolve_precision

PACKAGES = ("finetune-diffusion", "torch", "diffusers", "transformers", "peft", "accelerate", "tokenizers", "pillow")


@dataclass(frozen=True)
class Pins:
    """The inputs of the run in the folder `run`. `accept`: go on with changed ones, and write that down."""

    run: Path
    accept: bool = False

    def check(self, job: Prepared, step: int) -> None:
        """Compares the inputs with those that the run began with, or records them; on the main process.

        Args:
            step: the number of steps that are done, for the record.

        Raises:
            BadInput: something changed; it is named.
        """
        recorded, now = read_inputs(self.run), inputs_of(job)
        if recorded is None:
            write_inputs(self.run, InputsRecord(inputs=now))
            return
        drawn = {"class_images": recorded.inputs.class_images, "others": recorded.inputs.others}
        kept = now.model_copy(update=drawn)
        self._compare(recorded, kept, step)

    def check_class_images(self, streams: Sequence[Sequence[Sample]], step: int) -> None:
        """The same for the images that the base drew, which are there only after they were drawn.

        Raises:
            BadInput: some changed since the run began.
        """
        recorded = read_inputs(self.run)
        if recorded is None or len(streams) < 2:
            return
        found: dict[str, list[str]] = {}
        drawn = [sample for stream in streams[1:] for sample in stream]
        for sample in drawn:
            if sample.role == "class":
                found.setdefault(sample.captions[0], []).append(sample.crops[0].photo.digest)
        others = [[sample.captions[0], sample.crops[0].photo.digest] for sample in drawn if sample.role == "other"]
        now = recorded.inputs.model_copy(update={"class_images": found, "others": others})
        if now != recorded.inputs:
            self._compare(recorded, now, step)

    def _compare(self, recorded: InputsRecord, now: RunInputs, step: int) -> None:
        changed = changes(recorded.inputs, now)
        if changed and not self.accept:
            raise BadInput(refusal(self.run, changed))
        accepted = [*recorded.accepted, *([Accepted(step=step, changes=changed)] if changed else [])]
        write_inputs(self.run, InputsRecord(inputs=now, accepted=accepted))


def inputs_of(job: Prepared) -> RunInputs:
    """Everything that the run's result depends on, besides its recipe; the class images are added once drawn."""
    packages = (*PACKAGES, *job.recipe.optim.packages)
    return RunInputs(
        photos=_pinned_photos(job),
        tables=_pinned_tables(job),
        base=base_files(job.family.folder),
        packages={name: version(name) for name in packages} | {"python": platform.python_version()},
        tokens=[subject.token for subject in job.subjects],
        sample=dict(job.drawn_from.origins) if job.drawn_from else {},
        precision=resolve_precision(job.recipe.run),
    )


def in_order(job: Prepared, recorded: RunInputs) -> Prepared:
    """The job with its photos in the order in which the run began: renamed ones keep their place.

    Each subject is compared with its own part of the record: a photo of two subjects is in both.
    """
    records, first = [recorded] * len(job.subjects), 0
    of_files = {number: each for number, each in enumerate(job.subjects) if each.table is None}
    if len(recorded.photos) == sum(len(subject.photos) for subject in of_files.values()):
        for number, subject in of_files.items():
            own = recorded.photos[first : first + len(subject.photos)]
            records[number], first = recorded.model_copy(update={"photos": own}), first + len(own)
    return replace(job, subjects=[_ordered(*pair) for pair in zip(job.subjects, records, strict=True)])


def _ordered(subject: Subject, recorded: RunInputs) -> Subject:
    """Rows of a data set stay as they are: they can't be renamed."""
    if subject.table is not None:
        return subject
    order = in_recorded_order([photo.digest for photo in subject.photos], recorded)
    return replace(subject, captioned=[subject.captioned[number] for number in order])


def _pinned_photos(job: Prepared) -> list[PinnedPhoto]:
    """The photos that are files. Of many, their captions are recorded by a digest."""
    of_files = [subject.table is None for subject in job.subjects for _ in subject.captioned]
    items = [item for subject in job.subjects for item in subject.captioned]
    chosen = [number for number, is_file in enumerate(of_files) if is_file]
    beside = {number: job.files_beside(items[number].photo) for number in chosen}
    files = {file for found in beside.values() for file in found.values()}
    hashes = file_hashes(files) if files else {}
    return [
        PinnedPhoto(
            name=items[number].photo.path.name,
            sha256=items[number].photo.digest,
            captions=caption_pin(items[number].captions) if len(chosen) > LISTED else list(items[number].captions),
            beside={name: hashes[file] for name, file in beside[number].items()},
            repeats=job.emphasis[number][0],
            weight=job.emphasis[number][1],
        )
        for number in chosen
    ]


def _pinned_tables(job: Prepared) -> list[PinnedTable]:
    unseen, first = held_out_photos(job), 0
    found = []
    for subject in job.subjects:
        trained = [photo.digest for number, photo in enumerate(subject.photos, first) if number not in unseen]
        first += len(subject.photos)
        if subject.table is not None:
            told = json.dumps([item.captions for item in subject.captioned]).encode()
            pinned = {"captions": hashlib.sha256(told).hexdigest(), "images": told_images(trained)}
            found.append(PinnedTable(**asdict(subject.table), token=subject.token, **pinned))
    return found


def with_photos(recipe: Recipe, run: Path, photos: Path | None) -> Recipe:
    """The recipe of a run with the place where its photos are now (None: where they were).

    Raises:
        BadInput: they are not where they were.
    """
    if photos is None and (hub_id(recipe.data.photos) is not None or recipe.data.photos.exists()):
        return recipe
    if photos is None:
        raise BadInput(
            f"the photos of {run} are not in {recipe.data.photos} any more: say where they are with "
            f"`finetune resume {run} --photos FOLDER`"
        )
    place = photos if hub_id(photos) is not None else photos.expanduser().absolute()
    data = recipe.data.model_copy(update={"photos": place})
    return recipe.model_copy(update={"data": data})
