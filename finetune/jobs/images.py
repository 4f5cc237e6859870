"""Draws the images of a run: before training, after it, and previews."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from finetune.core.errors import BadInput, PromptCut
from finetune.core.events import ImagesDrawn, emit, phase
from finetune.core.files import replacing, replacing_folder
from finetune.data.conditioning.base import unit
from finetune.data.crops import make_crops
from finetune.families.base import Family
from finetune.families.drawing import ImageCondition, Wants
from finetune.families.loading import DiffusersFamily
from finetune.jobs.prepare import Prepared
from finetune.jobs.previews import from_file
from finetune.jobs.word_maps import recorder_of, write_maps
from finetune.runs.folder import RunFolder
from finetune.sampling.attention_maps import AttentionRecorder
from finetune.sampling.draw import draw
from finetune.sampling.given import DrawnFrom, pictures
from finetune.sampling.images import grid, parameters, save_image
from finetune.sampling.settings import Sampling

NUMBERED = re.compile(r"(\d+)--?\d+\.png$")


@dataclass(frozen=True)
class ImageRequest:
    """One image for each prompt at each seed. `model` is the name of the base that is written into the files.

    `origins` are the SHA-256 of the files that `condition` was made from: "image", "mask", "depth".
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    sampling: Sampling
    model: str
    condition: ImageCondition | None = None
    origins: Mapping[str, str] = field(default_factory=dict)


def draw_files(
    family: Family,
    request: ImageRequest,
    folder: Path,
    title: str = "Drawing",
    first: int = 0,
    recorder: AttentionRecorder | None = None,
) -> list[Image.Image]:
    """Draws all images, then writes each to `folder` as <prompt number>-<seed>.png: prompt by prompt, seed by seed.

    `title` names the phase in the events; `first` is the number of the first prompt. `recorder` watches the drawing.
    """
    inputs = _written(family.drawing.wants, request)
    pairs = [(number, seed) for number in range(len(request.prompts)) for seed in request.seeds]
    with phase(title, len(pairs), "images") as advance, recorder or nullcontext():

        def drawn(amount: int) -> None:
            advance(amount, "")
            if recorder is not None:
                recorder.next_batch(amount)

        images = draw(
            family,
            [request.prompts[number] for number, _ in pairs],
            request.sampling,
            seeds=[seed for _, seed in pairs],
            condition=request.condition,
            advance=drawn,
        )
    for (number, seed), image in zip(pairs, images, strict=True):
        about = parameters(request.prompts[number], seed, request.sampling, request.model, inputs)
        save_image(image, folder / f"{first + number:02d}-{seed}.png", about)
    return images


def _written(wants: Wants, request: ImageRequest) -> dict[str, str | float]:
    """What the images were drawn from, for their files; the numbers under A1111's names."""
    given = request.condition
    if given is None or not wants.names:
        return {}
    found: dict[str, str | float] = {
        f"{name.capitalize()} SHA-256": hashed for name, hashed in request.origins.items()
    }
    if "image_guidance" in wants.names:
        found["Image CFG scale"] = given.guidance
    if given.strength is not None:
        found["Denoising strength"] = given.strength
    return found


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
    grids. A row of a grid begins with what its images were drawn from. Returns the number of images and the grid's
    file."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file: give a folder for the images with --out")
    numbers = [int(found[1]) for path in folder.glob("*.png") if (found := NUMBERED.match(path.name))]
    first = max(numbers, default=-1) + 1
    images = draw_files(family, request, folder, first=first)
    page = unused(folder / "grid.png")
    with replacing(page) as temporary:
        _grid(family.drawing.wants, request, images).save(temporary, format="PNG")
    return len(images), page


def _grid(wants: Wants, request: ImageRequest, images: Sequence[Image.Image]) -> Image.Image:
    read = list(_read(wants, request).values())
    count = len(request.seeds)
    rows = [[*read, *images[start : start + count]] for start in range(0, len(images), count)]
    return grid([image for row in rows for image in row], len(read) + count, request.prompts)


def _read(wants: Wants, request: ImageRequest) -> dict[str, Image.Image]:
    """What the base reads for a request, as images."""
    return {} if request.condition is None else pictures(wants, request.condition)


def unused(path: Path) -> Path:
    """`path`, or the first NAME-2, NAME-3, ... that is not there."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return candidate


def draw_samples(job: Prepared, folder: Path, title: str, count: int | None = None, maps: Path | None = None) -> None:
    """Draws the sample prompts into `folder` (see `draw_files`), with the same seeds each time.

    Draws `count` images of each prompt, or `sample.count` if it is None. The folder appears only when it is complete.
    It also holds what the base has read: input-image.png, input-mask.png, input-depth.png.
    `maps`: a folder for maps of where the images read the run's words, for bases that have them.
    """
    sample = job.recipe.sample
    request = ImageRequest(
        job.sample_prompts(),
        range(sample.seed, sample.seed + (count or sample.count)),
        sample.sampling(job.resolution),
        job.recipe.base.source,
        (drawn_from := what_is_drawn_from(job)).condition,
        drawn_from.origins,
    )
    recorder = None if maps is None else recorder_of(job, request.prompts, request.seeds)
    with replacing_folder(folder) as temporary:
        draw_files(job.family, request, temporary, title, recorder=recorder)
        for name, image in _read(job.family.drawing.wants, request).items():
            image.save(temporary / f"input-{name}.png", format="PNG")
        if maps is not None and recorder is not None:
            write_maps(job, recorder, request.seeds, maps)
    emit(ImagesDrawn(folder))


def preview_folder(run: RunFolder, step: int) -> Path:
    """Where the images of this step's preview are; the folder is there only when they are all drawn."""
    return run.path / "samples" / f"step-{step:06d}"


def draw_preview(job: Prepared, run: RunFolder, step: int, idle: Sequence[str]) -> None:
    """Draws one image of each sample prompt, with the file that the run would export at this step.

    Afterwards the `idle` parts of the family are removed from memory again.
    """
    with from_file(run, job.family, step):
        draw_samples(job, preview_folder(run, step), "Preview", count=1)
    job.family.parts.release(idle)
    job.family.parts.place([part for part in job.family.parts if part not in idle])


def what_is_drawn_from(job: Prepared) -> DrawnFrom:
    """Returns the input for bases that draw from an image: what the recipe names, or the first photo with the files
    beside it."""
    if job.drawn_from is not None:
        return job.drawn_from
    photo = job.photos[0]
    crop = make_crops(photo, (job.resolution, job.resolution), "center", 1, False, job.recipe.run.seed)[0]
    if job.inputs is None:
        return DrawnFrom(ImageCondition(unit(crop.pixels())), {"image": photo.digest})
    return DrawnFrom(job.inputs.condition(crop), job.inputs.origins(photo))
