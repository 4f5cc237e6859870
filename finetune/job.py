"""The job: photos -> plan -> class images -> caches -> training -> pictures -> exports -> page.

Each stage is a function here and can be read on its own; the loop is in `finetune.loop`.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from finetune import families, tokens
from finetune.config import ClassImages, Recipe
from finetune.data.batches import Batches, Sample
from finetune.data.cache import LatentCache, PromptCache
from finetune.data.captions import Captioned, caption_photos, summarise
from finetune.data.photos import Photo, scan, sort_out
from finetune.data.views import enlarged, views
from finetune.errors import BadInput, CheckFailed, Stopped
from finetune.export import check_formats
from finetune.families.base import Family
from finetune.files import cache_dir
from finetune.loop import PromptEncoder, fit, make_accelerator, resolve_precision
from finetune.prior import check_set, class_images
from finetune.progress import phase
from finetune.report import write_report
from finetune.results import export_run
from finetune.run import RunFolder, next_folder
from finetune.sample import draw, parameters, save_picture
from finetune.signals import Interrupted, Signals

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Say = Callable[[str], None]


@dataclass
class Job:
    """A recipe, its base and its photos, looked at but not yet worked on."""

    recipe: Recipe
    family: Family
    base_hash: str
    token: str
    photos: list[Photo]
    captions: list[list[str]]
    captions_from_files: int
    caption_summary: str
    resolution: int

    @property
    def noun(self) -> str | None:
        return self.recipe.data.class_noun

    def fill(self, prompt: str) -> str:
        """A prompt with {token} and {noun} filled in."""
        return prompt.replace("{token}", self.token).replace("{noun}", self.noun or "")

    @property
    def class_prompt(self) -> str:
        prior = self.recipe.prior
        return self.fill(prior.prompt) if isinstance(prior, ClassImages) else ""

    def sample_prompts(self) -> list[str]:
        return [self.fill(prompt) for prompt in self.recipe.sample.prompts]


def look(recipe: Recipe, device: torch.device | str = "cpu") -> Job:
    """Scans the photos, loads the base on `device`, settles the token and the captions; writes nothing.

    Raises:
        BadInput: whatever is wrong with the photos, the captions, the base or the token.
    """
    photos, left_out = _photos(recipe)
    check_formats(recipe.export.formats, recipe.method.is_adapter)
    precision = DTYPES[resolve_precision(recipe.run)]
    family = families.load(
        recipe.base.source, recipe.base.revision, recipe.method.weight_dtype(precision), recipe.base.like
    )
    resolution = recipe.data.resolution or family.resolution
    if resolution % family.latent_factor:
        raise BadInput(
            f"data.resolution is {resolution}, which {family.name} can't divide by {family.latent_factor}: "
            f"choose {round(resolution / family.latent_factor) * family.latent_factor}"
        )
    family.to(device)
    recipe.objective.build(family.schedule)
    token = _token(recipe, family)
    captioned = caption_photos(
        photos,
        captions=recipe.data.captions,
        templates=recipe.data.templates,
        token=token,
        noun=recipe.data.class_noun,
    )
    _refuse_long(recipe, family, captioned)
    summary = "; ".join(text for text in (summarise(captioned, token), left_out) if text)
    base_hash = families.base_hash(family.folder)
    if isinstance(recipe.prior, ClassImages):
        check_set(recipe.prior, recipe.data.class_noun or "", resolution, base_hash)
    texts, from_files = [c.captions for c in captioned], sum(c.source == "file" for c in captioned)
    return Job(recipe, family, base_hash, token, photos, texts, from_files, summary, resolution)


def _photos(recipe: Recipe) -> tuple[list[Photo], str]:
    """The photos, and a sentence about those that were left out."""
    folder = recipe.data.photos
    photos, bad = sort_out(folder) if recipe.data.skip_bad else (scan(folder), "")
    if len(photos) > 1 and len({photo.digest for photo in photos}) == 1:
        raise BadInput(
            f"all {len(photos)} photos in {folder} are the same picture: give different photos of the subject"
        )
    return photos, f"{bad}; they are left out" if bad else ""


def _refuse_long(recipe: Recipe, family: Family, captioned: list[Captioned]) -> None:
    """Captions that the text encoders would not read to their end."""
    if recipe.data.long_captions == "cut":
        return
    length = min(tokenizer.model_max_length for tokenizer in family.tokenizers)
    long = [
        item.photo.path.name
        for item in captioned
        if any(len(tokenizer(text)["input_ids"]) > length for tokenizer in family.tokenizers for text in item.captions)
    ]
    if long:
        raise BadInput(
            f"the captions of {', '.join(long)} are longer than the {length} tokens that the text encoder reads: "
            "shorten them, or set data.long_captions=cut"
        )


def _token(recipe: Recipe, family: Family) -> str:
    token, most = recipe.data.token, recipe.data.token_pieces
    if token != "auto":
        pieces = max(tokens.describe(family.tokenizers, token).pieces, key=len)
        if len(pieces) > most:
            raise BadInput(
                f"the token {token!r} is {len(pieces)} pieces to this base ({' + '.join(pieces)}), each with a "
                f"meaning: find one with `finetune tokens suggest`, or allow it with data.token_pieces={len(pieces)}"
            )
        return token
    found = tokens.suggest(family, 1, recipe.data.class_noun)
    if not found:
        raise BadInput("no rare token was found in this base's tokenizer: give one with data.token=TOKEN")
    return found[0].text


def plan(job: Job) -> dict[str, Any]:
    """The run in numbers: what is seen how often, what is trained, what it costs in class images."""
    recipe = job.recipe
    seen = recipe.run.steps * recipe.run.batch_size
    rows: dict[str, Any] = {
        "base": f"{recipe.base.source} ({job.family.name}, {job.family.schedule.prediction})",
        "subject": job.caption_summary,
        "training prompts": list(dict.fromkeys(text for texts in job.captions for text in texts))[:5],
        "token": f"{job.token} (class noun: {job.noun or 'none'})",
        "resolution": job.resolution,
        "steps": f"{recipe.run.steps} of {recipe.run.batch_size} photo(s), {recipe.run.accumulate} micro-batch(es)",
        "each photo": f"seen {seen / len(job.photos):.0f} times",
    }
    if note := enlarged(job.photos, job.resolution):
        rows["enlarged"] = note
    if isinstance(recipe.prior, ClassImages):
        rows["class images"] = (
            f"{recipe.prior.count} of {job.class_prompt!r}, each seen {seen / recipe.prior.count:.1f} times"
        )
    method = recipe.method
    rows["method"] = f"{method.kind} on {', '.join(method.part_names(job.family))}"
    rows["precision"] = resolve_precision(recipe.run)
    return rows


def train(recipe: Recipe, run_dir: Path | str | None = None, say: Say = lambda line: None) -> Path:
    """Runs a recipe from end to end, or goes on where an interrupted run of it stopped; returns the run folder.

    Raises:
        BadInput: something in the recipe, the photos or the folder; nothing was half-written.
        CheckFailed: a step was not finite, or an export is not what was trained.
        Stopped: SIGINT or SIGTERM; `resume` goes on.
    """
    accelerator = make_accelerator(recipe.run, recipe.method.is_adapter)
    job = look(recipe, accelerator.device)
    chosen = [run_dir or recipe.run.dir or next_folder(recipe.run.name)]
    path = Path(broadcast_object_list(chosen)[0])  # processes that started at different moments see different folders
    accelerator.project_configuration.project_dir = accelerator.project_configuration.logging_dir = str(path)
    with Signals() as signals:
        try:
            folder = RunFolder(path)
            with folder.held(recipe) if accelerator.is_main_process else nullcontext():
                return _stages(job, folder, accelerator, say, signals)
        except Interrupted as stop:
            raise Stopped(path, stop.number) from stop


def _stages(job: Job, folder: RunFolder, accelerator: Accelerator, say: Say, signals: Signals) -> Path:
    recipe = job.recipe
    if accelerator.is_main_process:
        folder.write_info(_info(job, folder.info))
    accelerator.wait_for_everyone()
    say(f"{'run folder':>16}  {folder.path}")
    for name, value in plan(job).items():
        say(f"{name:>16}  {value}")
    if folder.finished(recipe.run.steps):
        _load_result(job, folder)
    else:
        _train(job, folder, accelerator, signals)
    if accelerator.is_main_process:
        _finish(job, folder, accelerator.device, say)
    accelerator.wait_for_everyone()
    return folder.path


def resume(run_dir: Path | str, say: Say = lambda line: None) -> Path:
    """Goes on with an interrupted run: what comes out is what the unbroken run would have given."""
    return train(RunFolder(Path(run_dir)).recipe, run_dir, say)


def _info(job: Job, before: dict[str, Any]) -> dict[str, Any]:
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return before | {
        "token": job.token,
        "class_noun": job.noun,
        "family": job.family.name,
        "base": job.recipe.base.source,
        "base_hash": job.base_hash,
        "resolution": job.resolution,
        "plan": plan(job),
        "captions": job.captions,
        "captions_from_files": job.captions_from_files,
        "photos": [str(photo.path) for photo in job.photos],
        "prompts": job.sample_prompts(),
        "guidance": job.recipe.sample.guidance,
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }


def _train(job: Job, folder: RunFolder, accelerator: Accelerator, signals: Signals) -> None:
    """The pictures of before, the training, and the trained weights in RUN/adapter."""
    recipe = job.recipe
    if accelerator.is_main_process and not (folder.path / "samples" / "before").is_dir():
        _draw_samples(job, folder.path / "samples" / "before", "Before")
    if recipe.run.trackers:
        accelerator.init_trackers("finetune", config={"recipe": recipe.model_dump_json()})
    fit_job(job, folder, accelerator, signals=signals)
    if recipe.run.trackers:
        accelerator.end_training()
    if accelerator.is_main_process:
        shutil.rmtree(folder.path / "samples" / "after", ignore_errors=True)  # of a shorter run
        about = {"base_hash": job.base_hash, "steps": str(recipe.run.steps)}
        folder.save_result(recipe.method.state_dict(job.family), about)


def fit_job(
    job: Job,
    folder: RunFolder,
    accelerator: Accelerator,
    on_step: Callable[[int], None] | None = None,
    signals: Signals | None = None,
) -> None:
    """Class images, caches, the method attached, and the loop: what is trained ends in `job.family`."""
    recipe, family, device = job.recipe, job.family, accelerator.device
    streams = _streams(job, accelerator)
    cache = _latents(job, streams, accelerator)
    encode_prompts = _prompt_encoder(job, streams, accelerator)
    trained = recipe.method.attach(family, recipe.run.seed)
    if recipe.run.gradient_checkpointing:
        family.enable_gradient_checkpointing(recipe.method.part_names(family))
    run = recipe.run
    batches = Batches(
        streams, cache, run.seed, run.batch_size, run.accumulate, accelerator.process_index, accelerator.num_processes
    )
    idle = _idle_parts(job, encode_prompts)
    family.release(idle)

    def after_step(step: int) -> None:
        if recipe.sample.every and step % recipe.sample.every == 0 and accelerator.is_main_process:
            family.restore(idle, device)
            _draw_samples(job, folder.path / "samples" / f"step-{step:06d}", "Preview", count=1)
            family.release(idle)
        if on_step is not None:
            on_step(step)

    fit(
        accelerator=accelerator,
        family=family,
        trained=trained,
        objective=recipe.objective.build(family.schedule),
        encode_prompts=encode_prompts,
        batches=batches,
        optim=recipe.optim,
        run=run,
        folder=folder,
        stratify=batches.samples_per_step if recipe.objective.timesteps == "stratified" else None,
        on_step=after_step,
        signals=signals,
    )
    family.restore(idle, device)


def _latents(job: Job, streams: Sequence[Sequence[Sample]], accelerator: Accelerator) -> LatentCache:
    cache = LatentCache(cache_dir(), job.base_hash, next(job.family.parts["vae"].parameters()).dtype)
    views = [view for stream in streams for sample in stream for view in sample.views]
    with phase("Latents", len(views)) as advance, accelerator.main_process_first():
        cache.fill(job.family, views, accelerator.device, lambda amount: advance(amount, ""))
    return cache


def _idle_parts(job: Job, encode_prompts: PromptEncoder) -> list[str]:
    """Frozen parts whose work is cached: they leave memory while the loop runs."""
    busy = {"denoiser", *job.recipe.method.part_names(job.family)}
    cached = isinstance(encode_prompts, PromptCache)
    return [part for part in job.family.parts if part not in busy and (part == "vae" or cached)]


def _streams(job: Job, accelerator: Accelerator) -> list[list[Sample]]:
    """Stream 0: the subject's photos. Stream 1, with a prior: class images, their loss weighted by lambda."""
    data, prior, seed = job.recipe.data, job.recipe.prior, job.recipe.run.seed
    subject = [
        Sample(
            views(photo, job.resolution, data.crop, data.crops, data.flip, seed),
            texts,
            1.0,
            data.caption_dropout,
            photo.path.name,
        )
        for photo, texts in zip(job.photos, job.captions, strict=True)
    ]
    if not isinstance(prior, ClassImages):
        return [subject]
    pictures = class_images(
        job.family,
        prior,
        job.noun or "",
        job.resolution,
        job.base_hash,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.wait_for_everyone,
    )
    classes = [
        Sample(
            views(picture, job.resolution, "center", 1, prior.flip, seed),
            [job.class_prompt],
            prior.weight,
            prior.caption_dropout,
            f"class image {picture.path.name}",
        )
        for picture in pictures
    ]
    return [subject, classes]


def _prompt_encoder(job: Job, streams: Sequence[Sequence[Sample]], accelerator: Accelerator) -> PromptEncoder:
    """Embeddings of frozen encoders are made once; encoders that train run in every step."""
    family = job.family
    if set(family.text_encoders) & set(job.recipe.method.part_names(family)):
        return family.encode_prompts
    prompts = [text for stream in streams for sample in stream for text in sample.captions]
    cache = PromptCache(family, job.base_hash, cache_dir(), next(family.parts["text_encoder"].parameters()).dtype)
    with accelerator.main_process_first():
        cache.fill(list(dict.fromkeys(["", *prompts])))
    return cache


def _draw_samples(job: Job, folder: Path, title: str, count: int | None = None) -> None:
    """PNGs <prompt number>-<seed>.png of every sample prompt, at the same seeds each time; all or no folder."""
    sample = job.recipe.sample
    seeds = [sample.seed + n for n in range(count or sample.count)]
    prompts = job.sample_prompts()
    pairs = [(p, s) for p in range(len(prompts)) for s in seeds]
    with phase(title, len(pairs)) as advance:
        pictures = draw(
            job.family,
            [prompts[p] for p, _ in pairs],
            negative=sample.negative,
            seeds=[s for _, s in pairs],
            sampler=sample.sampler,
            steps=sample.steps,
            guidance=sample.guidance,
            size=job.resolution,
            advance=lambda amount: advance(amount, ""),
        )
    temporary = folder.with_name(f".{folder.name}.tmp")
    for (p, s), picture in zip(pairs, pictures, strict=True):
        about = (sample.negative, s, sample.sampler, sample.steps, sample.guidance, job.resolution)
        save_picture(picture, temporary / f"{p:02d}-{s}.png", parameters(prompts[p], *about, job.recipe.base.source))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _load_result(job: Job, folder: RunFolder) -> None:
    job.recipe.method.attach(job.family, job.recipe.run.seed)
    job.recipe.method.load_state_dict(job.family, folder.result())


def _finish(job: Job, folder: RunFolder, device: torch.device, say: Say) -> None:
    job.family.to(device)
    if not (folder.path / "samples" / "after").is_dir():
        _draw_samples(job, folder.path / "samples" / "after", "After")
    exported = export_run(folder, job.family)
    write_report(folder.path)
    for item in exported:
        say(f"{item.format:>16}  {item.path}  {'; '.join(item.checks)}")
    failed = [item.format for item in exported if not item.ok]
    if failed:
        raise CheckFailed(f"the export to {', '.join(failed)} is not what was trained: see {folder.path}/report.html")
