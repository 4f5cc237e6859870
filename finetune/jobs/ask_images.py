"""Asks the base, before training and after it, whether the images of a run show what its sample prompts say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.core.events import one_step
from finetune.data.decoding import open_image
from finetune.export.bench import discard
from finetune.families.base import Family
from finetune.jobs.precision import base_dtype, set_precision
from finetune.jobs.prepare import Prepared
from finetune.objectives.densities import Uniform
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.runs.prompts_shown import Adherence, Asked, read_adherence, write_adherence
from finetune.sampling.draw import as_drawn
from finetune.training.step import PromptEncoder
from finetune.verdicts.adherence import LEAST, TOGETHER, Question, beside, helped, images_of, questions, with_class
from finetune.verdicts.bank import Canvas
from finetune.verdicts.due import asks_images, due_steps, samples_in_step
from finetune.verdicts.points import Predictor

TITLE = "Prompts"


def asked_of(job: Prepared) -> list[Question]:
    """What can be asked of a run: none where that is not measured, its base draws from an image, or nothing names a
    class."""
    run = job.recipe.run
    samples = samples_in_step(run, job.recipe.prior)
    from_images = job.family.inputs is not None or job.family.drawing.wants.names
    if not due_steps(run, samples) or not asks_images(run, samples) or from_images:
        return []
    prompts, found = job.sample_prompts(), dict[str, Question]()
    for subject in job.subjects:
        named = subject.noun if not subject.trigger else None
        for question in questions(prompts, subject.token, named) if named is not None else []:
            found.setdefault(question.prompt, replace(question, said=_without_tokens(job, question.said)))
    return list(found.values())[: TOGETHER // LEAST]


def ask_base(job: Prepared, run: Path) -> None:
    """Asks about the images from before training, unless that was done. Call it with the unchanged base."""
    if read_adherence(run) is not None:
        return
    asked, prompts, folder = asked_of(job), job.sample_prompts(), run / "samples" / "before"
    each = images_of(len(asked), job.recipe.sample.count)
    drawn = {prompt: _drawn(folder, prompts.index(prompt), each) for prompt in prompts}
    own = [(image, question) for question in asked for image in drawn[question.prompt]]
    rest = {question: _spread(images_of_others(job, drawn, question.prompt), each) for question in asked}
    others = [(image, question) for question in asked for image in rest[question]]
    if not own:
        return
    told = _helped(job, job.family, [*own, *others])
    if not all(map(math.isfinite, told)):
        return
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
    """Asks about the images of the trained model, unless that was done. Returns what each prompt lost; nothing where
    there are no images.

    The job's family is the base afterwards.
    """
    found, steps = read_adherence(run), job.recipe.run.steps
    if found is None or found.step == steps:
        return {} if found is None else found.lost
    prompts, folder = job.sample_prompts(), run / "samples" / "after"
    of = {question.prompt: question for question in asked_of(job)}
    count = images_of(len(found.asked), job.recipe.sample.count)
    sets = [_drawn(folder, prompts.index(each.prompt), count) if each.prompt in of else [] for each in found.asked]
    pairs = [(image, of[each.prompt]) for each, images in zip(found.asked, sets, strict=True) for image in images]
    told = _helped(job, _base(job), pairs) if pairs else []
    if not told or not all(map(math.isfinite, told)):
        return {}
    values = iter(told)
    asked = [
        each.model_copy(update={"after": [next(values) for _ in images]})
        for each, images in zip(found.asked, sets, strict=True)
    ]
    found = Adherence(step=steps, asked=asked)
    write_adherence(run, found)
    return found.lost


def _without_tokens(job: Prepared, text: str) -> str:
    """A text with the class in place of every subject that has one."""
    for subject in job.subjects:
        text = text if subject.noun is None else with_class(text, subject.token, subject.noun)
    return text


def images_of_others(job: Prepared, drawn: Mapping[str, Sequence[Path]], prompt: str) -> list[Path]:
    """The images of the prompts about a subject that say something else of it than this one."""
    named = {subject.token: subject.noun for subject in job.subjects}
    said = beside(prompt, named)
    found = {other: beside(other, named) for other in drawn}
    return [image for other, text in found.items() if text not in (other, said) for image in drawn[other]]


def _drawn(folder: Path, number: int, count: int) -> list[Path]:
    """The first images of the prompt with that number."""
    return sorted(folder.glob(f"{number:02d}-*.png"))[:count]


def _spread(images: Sequence[Path], count: int) -> list[Path]:
    """So many of them, of as many prompts as can be."""
    return [images[len(images) * number // count] for number in range(min(count, len(images)))]


def _base(job: Prepared) -> Family:
    """The base, loaded again in place of the trained model: what drew the images has the export in its own weights.
    One of them is in memory at a time."""
    device = job.family.device
    discard(job.family)
    with one_step("Base"):
        job.family = job.recipe.base.load(base_dtype(job.recipe))
    job.family.parts.device = device
    set_precision(job.family, job.recipe)
    return job.family


@torch.no_grad()
def _helped(job: Prepared, family: Family, pairs: Sequence[tuple[Path, Question]]) -> list[float]:
    family.parts.restore()
    family.parts.place(list(family.codec.parts))
    with one_step(TITLE):
        side, files = job.resolution, dict.fromkeys(image for image, _ in pairs)
        latents = {file: image_latents(family, open_image(file).convert("RGB").resize((side, side))) for file in files}
        texts = dict.fromkeys(text for _, question in pairs for text in (question.plain, question.said))
        with as_drawn(family):  # not the codec: SDXL's overflows under autocast in fp16
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
