"""Draws the images of a run: before training, after it, and previews."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from finetune.core.errors import BadInput, PromptCut
from finetune.core.events import ImagesDrawn, emit, phase
from finetune.core.files import replacing, replacing_folder
from finetune.data.conditioning.base import unit
from finetune.data.crops import make_crops
from finetune.families.base import Family
from finetune.families.drawing import ImageCondition
from finetune.families.loading import DiffusersFamily
from finetune.jobs.prepare import Prepared
from finetune.jobs.previews import from_file
from finetune.runs.folder import RunFolder
from finetune.sampling.draw import draw
from finetune.sampling.images import grid, parameters, save_image
from finetune.sampling.settings import Sampling

NUMBERED = re.compile(r"(\d+)--?\d+\.png$")


@dataclass(frozen=True)
class ImageRequest:
    """One image for each prompt at each seed. `model` is the name of the base that is written into the files."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    sampling: Sampling
    model: str
    condition: ImageCondition | None = None


def draw_files(
    family: Family, request: ImageRequest, folder: Path, title: str = "Drawing", first: int = 0
) -> list[Image.Image]:
    """Draws all images, then writes each to `folder` as <prompt number>-<seed>.png: prompt by prompt, seed by seed.

    `title` names the phase in the events; `first` is the number of the first prompt.
    """
    pairs = [(number, seed) for number in range(len(request.prompts)) for seed in request.seeds]
    with phase(title, len(pairs)) as advance:
        images = draw(
            family,
            [request.prompts[number] for number, _ in pairs],
            request.sampling,
            seeds=[seed for _, seed in pairs],
            condition=request.condition,
            advance=lambda amount: advance(amount, ""),
        )
    for (number, seed), image in zip(pairs, images, strict=True):
        about = parameters(request.prompts[number], seed, request.sampling, request.model)
        save_image(image, folder / f"{first + number:02d}-{seed}.png", about)
    return images


@torch.no_grad()
def name_cut_prompts(family: Family, prompts: Sequence[str]) -> list[str]:
    """A line for each prompt that is longer than a text encoder reads, with what is cut from it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(len(family.text_encoders)):
            if isinstance(family, DiffusersFamily):
                family.tokenize(index, prompts)
            else:
                family.encode_text(index, prompts)
    return list(dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, PromptCut)))


def draw_more(family: Family, request: ImageRequest, folder: Path) -> tuple[int, Path]:
    """Draws into a folder that may hold images of earlier calls, which stay: prompts are numbered on, and so are the
    grids. Returns the number of images and the grid's file."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file: give a folder for the images with --out")
    numbers = [int(found[1]) for path in folder.glob("*.png") if (found := NUMBERED.match(path.name))]
    first = max(numbers, default=-1) + 1
    images = draw_files(family, request, folder, first=first)
    page = unused(folder / "grid.png")
    with replacing(page) as temporary:
        grid(images, len(request.seeds), request.prompts).save(temporary, format="PNG")
    return len(images), page


def unused(path: Path) -> Path:
    """`path`, or the first NAME-2, NAME-3, ... that is not there."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return candidate


def draw_samples(job: Prepared, folder: Path, title: str, count: int | None = None) -> None:
    """Draws the sample prompts into `folder` (see `draw_files`), with the same seeds each time.

    Draws `count` images of each prompt, or `sample.count` if it is None. The folder appears only when it is complete.
    """
    sample = job.recipe.sample
    request = ImageRequest(
        job.sample_prompts(),
        range(sample.seed, sample.seed + (count or sample.count)),
        sample.sampling(job.resolution),
        job.recipe.base.source,
        image_condition(job),
    )
    with replacing_folder(folder) as temporary:
        draw_files(job.family, request, temporary, title)
    emit(ImagesDrawn(folder))


def draw_preview(job: Prepared, run: RunFolder, step: int, idle: Sequence[str]) -> None:
    """Draws one image of each sample prompt, with the file that the run would export at this step.

    Afterwards the `idle` parts of the family are removed from memory again.
    """
    with from_file(run, job.family, step):
        draw_samples(job, run.path / "samples" / f"step-{step:06d}", "Preview", count=1)
    job.family.parts.release(idle)
    job.family.parts.place([part for part in job.family.parts if part not in idle])


def image_condition(job: Prepared) -> ImageCondition:
    """Returns the input for bases that draw from an image: the first photo, and the files beside it."""
    crop = make_crops(job.photos[0], (job.resolution, job.resolution), "center", 1, False, job.recipe.run.seed)[0]
    return ImageCondition(unit(crop.pixels())) if job.inputs is None else job.inputs.condition(crop)
