"""What a run is, for its record (`RUN/run.json`)."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version

from finetune.core.errors import BadInput
from finetune.jobs.plan import plan
from finetune.jobs.prepare import Prepared
from finetune.runs.folder import RunFolder
from finetune.runs.plan import plan_rows
from finetune.runs.record import RecordedSubject, RunRecord


def started(folder: RunFolder) -> float | None:
    """When the run began: its record says it, and a resumed run does not begin again. None where that is lost."""
    if not (folder.path / "run.json").is_file():
        return float(round(time.time()))
    try:
        return folder.info.started
    except BadInput:  # it is damaged, and about to be written again
        return None


def record_of(job: Prepared) -> RunRecord:
    """The record of a prepared run, with its plan and the versions of the packages."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    several = [
        RecordedSubject(token=s.token, class_noun=s.noun, photos=len(s.photos), style=s.trigger) for s in job.subjects
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
        captions=job.captions,
        captions_from_files=job.captions_from_files,
        photos=[photo.path.as_posix() for photo in job.photos],
        subjects=several if len(several) > 1 else [],
        prompts=job.sample_prompts(),
        guidance=job.recipe.sample.guidance,
        image_guidance=job.recipe.sample.image_guidance,
        reads=list(job.family.drawing.wants.needed),
        versions={name: version(name) for name in packages} | {"python": platform.python_version()},
    )
