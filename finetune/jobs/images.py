"""The images of a run: before, after, and previews."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.core.events import ImagesDrawn, emit, phase
from finetune.core.files import replacing_folder
from finetune.data.conditioning.base import unit
from finetune.data.crops import make_crops
from finetune.families.base import ImageCondition
from finetune.jobs.prepare import Prepared
from finetune.jobs.previews import from_file
from finetune.runs.folder import RunFolder
from finetune.sampling.draw import draw
from finetune.sampling.images import parameters, save_image


def draw_samples(job: Prepared, folder: Path, title: str, count: int | None = None) -> None:
    """PNGs <prompt number>-<seed>.png of every sample prompt, at the same seeds each time; all or no folder."""
    sample = job.recipe.sample
    seeds = [sample.seed + n for n in range(count or sample.count)]
    prompts = job.sample_prompts()
    pairs = [(p, s) for p in range(len(prompts)) for s in seeds]
    with phase(title, len(pairs)) as advance:
        images = draw(
            job.family,
            [prompts[p] for p, _ in pairs],
            negative=sample.negative,
            seeds=[s for _, s in pairs],
            sampler=sample.sampler,
            steps=sample.steps,
            guidance=sample.guidance,
            size=job.resolution,
            batch_size=sample.batch_size,
            given=image_condition(job),
            advance=lambda amount: advance(amount, ""),
        )
    with replacing_folder(folder) as temporary:
        for (p, s), image in zip(pairs, images, strict=True):
            about = (sample.negative, s, sample.sampler, sample.steps, sample.guidance, job.resolution)
            save_image(image, temporary / f"{p:02d}-{s}.png", parameters(prompts[p], *about, job.recipe.base.source))
    emit(ImagesDrawn(folder))


def draw_preview(job: Prepared, run: RunFolder, step: int, idle: Sequence[str]) -> None:
    """One image of each sample prompt as the run's file of this step draws it; `idle` parts leave memory again."""
    with from_file(run, job.family, step):
        draw_samples(job, run.path / "samples" / f"step-{step:06d}", "Preview", count=1)
    job.family.release(idle)
    job.family.place([part for part in job.family.parts if part not in idle])


def image_condition(job: Prepared) -> ImageCondition:
    """What pictures are drawn from, by bases that draw from pictures: the first photo and what lies beside it."""
    view = make_crops(job.photos[0], (job.resolution, job.resolution), "center", 1, False, job.recipe.run.seed)[0]
    return ImageCondition(unit(view.pixels())) if job.inputs is None else job.inputs.given(view)
