"""The job: photos -> plan -> class images -> caches -> training -> pictures -> exports -> page.

Each stage is a function here and can be read on its own; the loop is in `finetune.loop`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune.core.progress import phase
from finetune.data.conditioning.base import unit
from finetune.data.crops import make_crops
from finetune.families.base import ImageCondition
from finetune.jobs.prepare import Prepared
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
            given=image_condition(job),
            advance=lambda amount: advance(amount, ""),
        )
    temporary = folder.with_name(f".{folder.name}.tmp")
    for (p, s), image in zip(pairs, images, strict=True):
        about = (sample.negative, s, sample.sampler, sample.steps, sample.guidance, job.resolution)
        save_image(image, temporary / f"{p:02d}-{s}.png", parameters(prompts[p], *about, job.recipe.base.source))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def image_condition(job: Prepared) -> ImageCondition:
    """What pictures are drawn from, by bases that draw from pictures: the first photo and what lies beside it."""
    view = make_crops(job.photos[0], (job.resolution, job.resolution), "center", 1, False, job.recipe.run.seed)[0]
    return ImageCondition(unit(view.pixels())) if job.inputs is None else job.inputs.given(view)
