"""Verdicts during a run: what it is measured with, when, and what follows from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from finetune.core.errors import BadInput
from finetune.core.events import Judged, Measured, emit, one_step
from finetune.core.files import cache_dir
from finetune.core.rng import SampleKey, generator
from finetune.data.batches import Batches, Drawn
from finetune.data.cache import Encodable, LatentCache, PromptCache
from finetune.data.crops import Crop, make_crops
from finetune.data.decoding import open_image
from finetune.data.samplers import Sample
from finetune.jobs.ask_images import ask_about_result, canvas_of, image_latents
from finetune.jobs.dataset import held_out_photos, make_batches, trained_photos
from finetune.jobs.neutral import base_prompts
from finetune.jobs.prepare import Prepared
from finetune.methods.textual_inversion import Inversion
from finetune.runs.folder import RunFolder
from finetune.training.peers import joined
from finetune.training.settings import Run
from finetune.training.step import PromptEncoder
from finetune.training.trainer import Trainer
from finetune.verdicts.advice import means_of
from finetune.verdicts.bank import Bank
from finetune.verdicts.changed import Change, change
from finetune.verdicts.due import CLASS_DRAWINGS, PHOTO_POINTS, asks_drawings, due_steps, samples_in_step
from finetune.verdicts.measures.prompts_lost import PromptsLost
from finetune.verdicts.memorisation import Memorisation, memorised, photo_latents
from finetune.verdicts.points import Point, Predictor, of_batch
from finetune.verdicts.probe import BaseProbe, Material, known_prompts, make_sets, neutral_prompts
from finetune.verdicts.rows import FILE, Row, read_rows, up_to, with_images, writable
from finetune.verdicts.rules import best_row, judged
from finetune.verdicts.verdict_file import SaidByImages, missing, write_verdict

COMPARED = 2_000  # photos that drawn images are compared with, in memory; of more, the first ones
NOISY = 0.85  # the share of the noise levels above which photos are measured
CLOSER = 1.2  # how much larger the subject is in a held-out crop: a view that no crop of the training has


@dataclass
class Watch:
    """Measures a run while it trains. The main process does it while the others wait.

    `material` is None on the others. `due` is empty for a run that is not measured.
    """

    job: Prepared
    due: Sequence[int]
    material: Material | None = None
    rows: list[Row] = field(default_factory=list)

    def begin(self, folder: RunFolder, trainer: Trainer, encode_prompts: PromptEncoder) -> None:
        """Asks the base. The trained weights must still be those from before training."""
        self.folder, self.trainer = folder, trainer
        if self.material is not None:
            began = time.perf_counter()
            with one_step("Verdicts"):
                predict = Predictor(self.job.family, encode_prompts, _batch_size(self.job))
                self.probe = BaseProbe(predict, make_sets(self.material, _bank(self.job, predict)))
            self._note(0, began)
        joined().wait()

    def after_step(self, step: int) -> None:
        """Measures the weights that an export would contain now, where it is time."""
        if step not in self.due:
            return
        if self.material is not None:
            began = time.perf_counter()
            with self.trainer.result_weights():
                self._note(step, began)
        joined().wait()
        if self.job.recipe.run.keep_best:
            self._keep_best(step)

    def after_restore(self, step: int) -> None:
        """Goes on from the rows up to the restored step; what a kill left out is measured now."""
        if self.material is not None:
            self.rows = up_to(read_rows(self.folder.path / FILE), step) or self.rows
            last = self.rows[-1]
            emit(Judged(last.step, last.values, judged(self.rows).word if last.step else ""))
        if step in self.due and joined().from_first(step not in {row.step for row in self.rows}):
            self.after_step(step)

    def _note(self, step: int, began: float) -> None:
        values = writable(self.probe.values() if step else self.probe.of_base)
        row = Row(step, values, time.perf_counter() - began)
        self.rows.append(row)
        emit(Measured(step, values, row.seconds, judged(self.rows).word if step else ""))

    def _keep_best(self, step: int) -> None:
        """Saves a checkpoint if this step is the best so far; it stays until a later one is better."""
        self.trainer.settle()  # checkpoints are not dropped while one is written
        best = best_row(self.rows)
        if not joined().from_first(best is not None and best.step == step):
            return
        if self.material is not None:
            self.folder.checkpoints.protect(step)
        if joined().from_first(self.folder.checkpoints.newest_step() != step):
            self.trainer.save(step)
        elif self.material is not None:  # saved before it was the best: the best before it goes now
            self.folder.checkpoints.drop_others(step, self.job.recipe.run.keep)


def finish_verdicts(job: Prepared, folder: RunFolder) -> list[str]:
    """Writes RUN/verdict.json of a finished run, and returns what it says; nothing for a run that was not measured.
    What the images say beside their prompts is added to the last row."""
    rows = read_rows(folder.path / FILE)
    lost = ask_about_result(job, folder.path) if rows else {}
    rows = with_images(folder.path / FILE, {PromptsLost.name: max(lost.values(), default=None)}) if rows else rows
    thing = job.recipe.data.thing
    means = means_of(job.recipe.prior, job.family.inputs, folder.checkpoints.named_steps(), thing)
    verdict = judged(rows, means=means)
    if not verdict.found:
        return []
    samples = folder.path / "samples"
    drawn = SaidByImages(_memorised(job, samples / "after"), _changed(job, folder.info.prompts, samples), lost)
    write_verdict(folder.path, verdict, rows[-1], drawn, missing(rows))
    emit(Judged(rows[-1].step, rows[-1].values, verdict.word))
    last, steps = rows[-1].step, job.recipe.run.steps
    when = "" if last == steps else f"after step {last} of {steps}, the last that was measured: "
    first = f"{when}{', '.join(verdict.found)}: {verdict.sentence} {verdict.advice}".rstrip()
    return [first, *drawn.sentences]


def _changed(job: Prepared, prompts: Sequence[str], samples: Path) -> Change | None:
    """Of the images of prompts with a token; None where there are too few, before or after training."""
    tokens, pairs = [subject.token for subject in job.subjects], []
    for file in sorted((samples / "after").glob("[0-9]*-*.png")):
        number, before = int(file.stem.split("-", 1)[0]), samples / "before" / file.name
        if number < len(prompts) and any(token in prompts[number] for token in tokens) and before.is_file():
            pairs.append((open_image(before), open_image(file)))
    return change(pairs, job.recipe.data.thing)


def _memorised(job: Prepared, folder: Path) -> Memorisation | None:
    """Compares with the photos that were trained on. None for images that are drawn from a photo, as an edit is, and
    where there are none."""
    files = {file.name: file for file in sorted(folder.glob("[0-9]*.png"))}
    if not files or job.family.drawing.wants.needed:
        return None
    family, side = job.family, job.resolution
    family.parts.restore(list(family.codec.parts))
    family.parts.place(list(family.codec.parts))
    drawn = (open_image(file).convert("RGB").resize((side, side)) for file in files.values())
    numbers = trained_photos(job)[:COMPARED]
    crops = (make_crops(job.photos[number], side, "center", 1, False, 0)[0].image() for number in numbers)
    seen, photos = (photo_latents((image, image_latents(family, image)) for image in each) for each in (drawn, crops))
    found = memorised(list(files), seen, photos)
    return replace(found, nearest=[replace(item, photo=numbers[item.photo]) for item in found.nearest])


def best_step(folder: RunFolder) -> int:
    """The step that the verdicts recommend, whose weights are there; of a run at work, among those so far.

    Raises:
        BadInput: this is no run, nothing was measured yet, or that step's checkpoint is not there or damaged.
    """
    run, best = folder.recipe.run, best_row(read_rows(folder.path / FILE))
    if best is None:
        raise BadInput(f"{folder.path} has no verdicts, which choose the best step: {_unmeasured(folder, run)}")
    kept = folder.checkpoints.steps()
    if best.step in kept or (best.step == run.steps and folder.finished(best.step)):
        return best.step
    there = (folder.checkpoints.path / f"step-{best.step:06d}").is_dir()
    listed = f"(kept: {', '.join(map(str, kept)) or 'none'})"
    if there:
        raise BadInput(
            f"the checkpoint of step {best.step}, the best of {folder.path} by its verdicts, is damaged {listed}: "
            "choose another with --step"
        )
    again = "it is lost, though run.keep_best is on" if run.keep_best else "or train again with run.keep_best=true"
    raise BadInput(
        f"the best step of {folder.path} by its verdicts is {best.step}, whose checkpoint was not kept {listed}: "
        f"choose one with --step{'; ' if run.keep_best else ', '}{again}"
    )


def _unmeasured(folder: RunFolder, run: Run) -> str:
    """Why a run has no verdicts, and what to do."""
    due = due_steps(run, samples_in_step(run, folder.recipe.prior))
    if due and not folder.finished(run.steps):
        return f"the first one comes after step {due[0]} of {run.steps}; until then give a number with --step"
    off = run.verdicts == "off"
    why = "run.verdicts is off" if off else "it was too short for them" if not due else f"{FILE} is lost"
    return f"{why}; give a number with --step, or train with run.verdicts=on"


def make_watch(
    job: Prepared, streams: list[list[Sample]], cache: LatentCache, encode_prompts: PromptEncoder, is_main: bool
) -> Watch:
    """To be called while the VAE and the text encoders are in memory. Fills the caches with what is measured."""
    samples = samples_in_step(job.recipe.run, job.recipe.prior)
    due = due_steps(job.recipe.run, samples)
    if not due or not is_main:
        return Watch(job, due)
    trained, unseen = _samples(job, streams)
    held = [Sample([crop], sample.captions, 1.0, 0.0, sample.name) for sample, crop in unseen]
    seen = [crop for _, crop in unseen]
    images: list[Encodable] = list(seen)
    if job.inputs is not None:
        images += [image for crop in seen for image in job.inputs.images(crop)]
    cache.fill(job.family, images)
    photos, others = (_points(job, samples, make_batches(job, [samples], cache)) for samples in (trained, held))
    nouns = [subject.noun for subject in job.subjects]
    known = known_prompts(nouns, base_prompts(job.family.folder)) if asks_drawings(job.recipe.run, samples) else []
    material = Material(photos, others, _classes(job), neutral_prompts(nouns), known)
    if isinstance(encode_prompts, PromptCache):
        encode_prompts.fill(material.prompts)
    return Watch(job, due, material)


def _samples(job: Prepared, streams: list[list[Sample]]) -> tuple[list[Sample], list[tuple[Sample, Crop]]]:
    """The trained samples to measure, and samples that are not trained on with a crop of each: photos that were held
    out, or closer crops of the trained ones."""
    photos = list({sample.name: sample for sample in streams[0]}.values())  # one that is repeated is measured once
    order = torch.randperm(len(photos), generator=generator(job.recipe.run.seed, "verdict photos")).tolist()
    chosen = [photos[index] for index in order[:PHOTO_POINTS]]
    numbers = sorted(held_out_photos(job))
    if not numbers:
        return chosen, [(sample, _closer(sample.crops[0], job.recipe.run.seed)) for sample in chosen]
    unseen = []
    for number in numbers[:PHOTO_POINTS]:
        photo, size, texts = job.photos[number], job.sizes[number], job.captions[number]
        crops = make_crops(photo, size, "center", 1, False, job.recipe.run.seed)
        unseen.append((Sample(crops, texts, 1.0, 0.0, job.names[number]), crops[0]))
    return chosen, unseen


def _closer(crop: Crop, seed: int) -> Crop:
    """A crop of the same size from the photo enlarged by CLOSER, at a place of its own."""
    width, height = (round(side * CLOSER) for side in crop.resized)
    right, down = torch.rand(2, generator=generator(seed, f"held out:{crop.photo.digest}")).tolist()
    # not farther from the middle than half of the spare room: the subject stays in sight
    corner = [
        round((0.25 + share / 2) * (large - own))
        for share, large, own in ((right, width, crop.size[0]), (down, height, crop.size[1]))
    ]
    return Crop(crop.photo, crop.size, (width, height), (corner[0], corner[1]), False)


def _points(job: Prepared, samples: Sequence[Sample], batches: Batches) -> list[Point]:
    """PHOTO_POINTS points of the samples, spread evenly over the noisier timesteps: there it is decided what an image
    shows, and not its grain."""
    objective = canvas_of(job.family, job.resolution).objective
    points = []
    for number in range(PHOTO_POINTS):
        sample = samples[number % len(samples)]
        key = SampleKey(job.recipe.run.seed, -1, number)  # no step of the run has this number
        batch = batches.of(Drawn(key, sample.name, sample.crops[0], sample.captions[0], 1.0, sample.role))
        share = NOISY + (number + 0.5) / PHOTO_POINTS * (1 - NOISY)
        u = torch.tensor([share * job.family.timestep_fraction])
        points += of_batch(batch, objective, u, [key])
    return points


def _classes(job: Prepared) -> list[tuple[str | None, str]]:
    """(prompt without the token, the same with it) of each subject with a noun, or of the captions of a style; without
    either the first caption, which has no class."""
    pairs: dict[str | None, str] = {}
    for subject in job.subjects:
        if subject.noun is not None:
            template = job.class_prompt_of(subject) if not job.recipe.prior.of_captions else ""
            pairs.setdefault(template or f"a photo of a {subject.noun}", subject.fill("a photo of {token} {noun}"))
        elif subject.trigger:
            for item in subject.captioned:
                pairs |= {plain: text for plain, text in zip(item.plain, item.captions, strict=True) if plain}
    pairs = pairs or {None: job.captions[0][0]}
    return list(pairs.items())[: max(CLASS_DRAWINGS, len(job.subjects))]


def _bank(job: Prepared, predict: Predictor) -> Bank:
    return Bank(predict, canvas_of(job.family, job.resolution), _drawn_by(job), cache_dir())


def _drawn_by(job: Prepared) -> str:
    """Names the base and what else its drawings depend on, beside their prompts."""
    family, method = job.family, job.recipe.method
    dtype = family.autocast or family.parts.dtype("denoiser")
    left_out = f":without {', '.join(family.left_out)}" if family.left_out else ""
    # without a class, the new word itself is drawn, with the start values that it has
    words = f":{method.init}:{method.vectors}:{method.norm}" if isinstance(method, Inversion) and not job.noun else ""
    return f"{job.base_hash}:{dtype}:{family.inputs}{left_out}{words}"


def _batch_size(job: Prepared) -> int:
    """Points at a time: twice the samples of a micro-batch, which needs several times as much memory for each."""
    run = job.recipe.run
    streams = 1 if job.recipe.prior.class_images is None else 2
    return max(2, 2 * streams * run.batch_size // (run.accumulate * joined().world))
