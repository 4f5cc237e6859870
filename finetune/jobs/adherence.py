"""Asks the base, before training and after it, whether the images of a run show what its sample prompts say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.core.events import one_step
from finetune.data.decoding import open_image
from finetune.families.base import Family
from finetune.jobs.prepare import Prepared
from finetune.methods.start import adapted_layers, adapters_disabled
from finetune.objectives.densities import Uniform
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.runs.adherence import Adherence, Asked, read_adherence, write_adherence
from finetune.sampling.draw import as_drawn
from finetune.training.step import PromptEncoder
from finetune.verdicts.adherence import LEAST, TOGETHER, Question, helped, images_of, questions
from finetune.verdicts.bank import Canvas
from finetune.verdicts.due import asks_images, due_steps, samples_in_step
from finetune.verdicts.points import Predictor

TITLE = "Prompts"
Pair = tuple[Path, Question]  # an image, and what it is asked about


def asked_of(job: Prepared) -> list[Question]:
    """What can be asked of a run: none where that is not measured, its base draws from an image, or nothing names a
    class."""
    run = job.recipe.run
    samples = samples_in_step(run, job.recipe.prior)
    if not due_steps(run, samples) or not asks_images(run, samples) or job.family.inputs is not None:
        return []
    prompts = job.sample_prompts()
    found = [
        question
        for subject in job.subjects
        if subject.noun is not None and not subject.trigger
        for question in questions(prompts, subject.token, subject.noun)
    ]
    return found[: TOGETHER // LEAST]


def ask_base(job: Prepared, run: Path) -> None:
    """Asks about the images from before training. Call it with the unchanged base."""
    asked, prompts, folder = asked_of(job), job.sample_prompts(), run / "samples" / "before"
    each = images_of(len(asked), job.recipe.sample.count)
    images = {question: _drawn(folder, prompts.index(question.prompt), each) for question in asked}
    every = [
        image for number, prompt in enumerate(prompts) if _about(job, prompt) for image in _drawn(folder, number, each)
    ]
    own = [(image, question) for question in asked for image in images[question]]
    others = [
        (image, question)
        for question in asked
        for image in _spread([image for image in every if image not in images[question]], each)
    ]
    if not own:
        return
    told = _helped(job, job.family, [*own, *others])
    found = [
        Asked(
            prompt=question.prompt,
            own=[value for (_, of), value in zip(own, told, strict=False) if of == question],
            others=[value for (_, of), value in zip(others, told[len(own) :], strict=True) if of == question],
        )
        for question in asked
    ]
    write_adherence(run, Adherence(asked=found))


def ask_about_result(job: Prepared, run: Path) -> dict[str, float]:
    """Asks about the images of the trained model, unless that was done. Returns what each prompt lost.

    `job.family` is the base with what was exported, or the exported model. Its adapters are off meanwhile; in place of
    a model that was trained whole, the base is loaded, and stays as the job's family.
    """
    found, steps = read_adherence(run), job.recipe.run.steps
    if found is None:
        return {}
    if found.step != steps:
        prompts, folder = job.sample_prompts(), run / "samples" / "after"
        of = {question.prompt: question for question in asked_of(job)}
        count = images_of(len(found.asked), job.recipe.sample.count)
        sets = [_drawn(folder, prompts.index(each.prompt), count) if each.prompt in of else [] for each in found.asked]
        pairs = [(image, of[each.prompt]) for each, images in zip(found.asked, sets, strict=True) for image in images]
        with _as_base(job) as family:
            told = iter(_helped(job, family, pairs) if pairs else [])
        asked = [
            each.model_copy(update={"after": [next(told) for _ in images]})
            for each, images in zip(found.asked, sets, strict=True)
        ]
        found = Adherence(step=steps, asked=asked)
        write_adherence(run, found)
    return found.lost


def _about(job: Prepared, prompt: str) -> bool:
    return any(subject.token in prompt for subject in job.subjects)


def _drawn(folder: Path, number: int, count: int) -> list[Path]:
    """The first images of the prompt with that number."""
    return sorted(folder.glob(f"{number:02d}-*.png"))[:count]


def _spread(images: Sequence[Path], count: int) -> list[Path]:
    """So many of them, of as many prompts as can be."""
    return [images[len(images) * number // count] for number in range(min(count, len(images)))]


@contextmanager
def _as_base(job: Prepared) -> Iterator[Family]:
    """The base, in place of the trained model."""
    family, method = job.family, job.recipe.method
    parts = [part for part in family.parts if part not in family.codec.parts]
    if method.is_adapter:
        with adapters_disabled(family, adapted_layers(family, parts))() as base:
            yield base
        return
    device, dtype = family.device, family.parts.dtype("denoiser")
    job.family = job.recipe.base.load(dtype)
    job.family.parts.device = device
    yield job.family


@torch.no_grad()
def _helped(job: Prepared, family: Family, pairs: Sequence[Pair]) -> list[float]:
    family.parts.restore()
    family.parts.place(list(family.codec.parts))
    with one_step(TITLE), as_drawn(family):
        side, files = job.resolution, dict.fromkeys(image for image, _ in pairs)
        latents = {file: image_latents(family, open_image(file).convert("RGB").resize((side, side))) for file in files}
        texts = dict.fromkeys(text for _, question in pairs for text in (question.plain, question.said))
        predict = Predictor(family, _encoder(family, list(texts)), job.recipe.sample.batch_size)
        return helped(predict, canvas_of(family, side), [(latents[image], question) for image, question in pairs])


def _encoder(family: Family, prompts: Sequence[str]) -> PromptEncoder:
    """Encodes each prompt once, and places the denoiser."""
    family.parts.place(family.text_encoders)
    held = {prompt: family.encode_prompts([prompt]) for prompt in prompts}
    family.parts.place(["denoiser"])

    def encode(wanted: Sequence[str], uniform: Tensor | None) -> dict[str, Tensor]:
        return {name: torch.cat([held[prompt][name] for prompt in wanted]) for name in held[wanted[0]]}

    return encode


def canvas_of(family: Family, side: int) -> Canvas:
    """Square images of `side` pixels, with the base's objective, not the recipe's: what is measured does not depend on
    how a run draws timesteps."""
    objective = build_objective(ObjectiveSettings(density=Uniform()), family.schedule, family.shift(side))
    latents = side // family.codec.factor
    return Canvas((family.codec.channels, latents, latents), side, objective, family.timestep_fraction)


def image_latents(family: Family, image: Image.Image) -> Tensor:
    """The latents [C, h, w] of an RGB image, on the CPU. The codec must be in its place."""
    values = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    return family.codec.encode(values.to(family.device)).mean[0].cpu()
