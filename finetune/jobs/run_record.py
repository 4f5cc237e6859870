"""What a run is, for its record (`RUN/run.json`)."""

from __future__ import annotations

import platform
import time
from collections import Counter
from importlib.metadata import version
from typing import Any

from finetune.core.errors import BadInput
from finetune.data.tables import content_of
from finetune.jobs.plan import plan
from finetune.jobs.prepare import Prepared
from finetune.runs.about import caption_tags
from finetune.runs.folder import RunFolder
from finetune.runs.plan import plan_rows
from finetune.runs.record import RecordedSubject, RunRecord

LISTED = 1_000  # photos that a record lists; of more, the first ones of each subject
LEAST = 12  # of each subject: the report shows so many
TAGS = 1_000  # that are counted where not all captions are listed


def started(folder: RunFolder) -> float | None:
    """When the run began: its record says it, and a resumed run does not begin again. None where that is lost."""
    if not (folder.path / "run.json").is_file():
        return float(round(time.time()))
    try:
        return folder.info.started
    except BadInput:  # it is damaged, and about to be written again
        return None


def listed_photos(job: Prepared) -> list[int]:
    """The indices in `job.photos` of those that the run's record lists: all, or the first ones of each subject."""
    return [index for numbers in _listed(job) for index in numbers]


def _listed(job: Prepared) -> list[range]:
    """The same by subject."""
    counts = [len(subject.photos) for subject in job.subjects]
    most = max(counts) if sum(counts) <= LISTED else max(LEAST, LISTED // len(counts))
    starts = [sum(counts[:number]) for number in range(len(counts))]
    return [range(start, start + min(count, most)) for start, count in zip(starts, counts, strict=True)]


def _of_all(job: Prepared) -> dict[str, Any]:
    """What a record says of photos that it does not list; empty where all are listed."""
    if len(job.photos) == len(listed_photos(job)):
        return {}
    tags = dict(Counter(caption_tags(job.captions)).most_common(TAGS))
    return {"photo_count": len(job.photos), "content": content_of(job.photos, job.captions), "tags": tags}


def record_of(job: Prepared) -> RunRecord:
    """The record of a prepared run, with its plan and the versions of the packages."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    some, counts = listed_photos(job), [len(numbers) for numbers in _listed(job)]
    of_all = _of_all(job)
    several = [
        RecordedSubject(
            token=s.token, class_noun=s.noun, photos=len(s.photos), style=s.trigger, listed=count if of_all else None
        )
        for s, count in zip(job.subjects, counts, strict=True)
    ]
    planned = plan(job)
    return RunRecord(
        token=job.token,
        class_noun=job.noun,
        style=job.subjects[0].trigger,
        family=job.family.name,
        base=job.recipe.base.source,
        base_hash=job.base_hash,
        resolution=job.resolution,
        plan=plan_rows(planned),
        planned=planned,
        captions=[job.captions[index] for index in some],
        captions_from_files=job.captions_from_files,
        photos=[job.photos[index].path.as_posix() for index in some],
        **of_all,
        subjects=several if len(several) > 1 else [],
        prompts=job.sample_prompts(),
        guidance=job.recipe.sample.guidance,
        image_guidance=job.recipe.sample.image_guidance,
        reads=list(job.family.drawing.wants.needed),
        versions={name: version(name) for name in packages} | {"python": platform.python_version()},
    )
