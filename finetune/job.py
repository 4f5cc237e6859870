"""The job: photos -> plan -> class images -> caches -> training -> pictures -> exports -> page.

Each stage is a function here and can be read on its own; the loop is in `finetune.loop`.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from finetune import objectives
from finetune.config import ClassImages, Recipe
from finetune.data.batches import Batches, Sample
from finetune.data.cache import LatentCache, Picture, PromptCache
from finetune.data.inputs import unit
from finetune.data.masks import Masks
from finetune.data.orders import Buckets, Permutations
from finetune.data.views import views
from finetune.determinism import deterministic
from finetune.errors import CheckFailed, Stopped
from finetune.families.base import Given
from finetune.files import cache_dir
from finetune.loop import PromptEncoder, fit, make_accelerator
from finetune.penalties import Attached
from finetune.plan import Job, look, plan
from finetune.previews import from_file
from finetune.prior import class_images
from finetune.progress import phase
from finetune.report import write_report
from finetune.results import export_run, open_exported, write_companions
from finetune.run import RunFolder, next_folder
from finetune.sample import draw, parameters, save_picture
from finetune.signals import Interrupted, Signals

Say = Callable[[str], None]


def train(recipe: Recipe, run_dir: Path | str | None = None, say: Say = lambda line: None) -> Path:
    """Runs a recipe from end to end, or goes on where an interrupted run of it stopped; returns the run folder.

    Raises:
        BadInput: something in the recipe, the photos or the folder; nothing was half-written.
        CheckFailed: a step was not finite, or an export is not what was trained.
        Stopped: SIGINT or SIGTERM; `resume` goes on.
    """
    with deterministic(recipe.run.deterministic):
        return _train_here(recipe, run_dir, say)


def _train_here(recipe: Recipe, run_dir: Path | str | None, say: Say) -> Path:
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
    several = [{"token": s.token, "class_noun": s.noun, "photos": len(s.photos)} for s in job.subjects]
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
        "photos": [photo.path.as_posix() for photo in job.photos],
        **({"subjects": several} if len(several) > 1 else {}),
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
    recipe, family = job.recipe, job.family
    streams = _streams(job, accelerator)
    cache = _latents(job, streams, accelerator)
    encode_prompts = _prompt_encoder(job, streams, accelerator)
    idle = _idle_parts(job, encode_prompts)
    busy = [part for part in family.parts if part not in idle]
    family.release(idle)
    family.place(busy)
    trained = recipe.method.attach(family, recipe.run.seed)
    if recipe.run.gradient_checkpointing:
        family.enable_gradient_checkpointing(recipe.method.part_names(family))
    run = recipe.run
    kind = Buckets if recipe.data.shape == "buckets" else Permutations
    batches = Batches(
        streams,
        cache,
        run.seed,
        run.batch_size,
        run.accumulate,
        accelerator.process_index,
        accelerator.num_processes,
        kind(streams, run.seed, run.batch_size),
        _masks(job, streams),
        job.inputs,
    )
    attached = Attached(family, recipe.method, trained, encode_prompts, job.class_prompt, job.class_prompts)

    def after_step(step: int) -> None:
        if recipe.sample.every and step % recipe.sample.every == 0 and accelerator.is_main_process:
            with from_file(folder, family, step):
                _draw_samples(job, folder.path / "samples" / f"step-{step:06d}", "Preview", count=1)
            family.release(idle)
            family.place(busy)
        if on_step is not None:
            on_step(step)

    fit(
        accelerator=accelerator,
        family=family,
        trained=trained,
        objective=objectives.build(recipe.objective, family.schedule, family.shift(job.resolution)),
        encode_prompts=encode_prompts,
        batches=batches,
        optim=recipe.optim,
        run=run,
        folder=folder,
        stratify=batches.samples_per_step if recipe.objective.timesteps == "stratified" else None,
        encoder_dropout=recipe.data.encoder_dropout,
        windows=recipe.method.windows(trained),
        penalties=recipe.prior.penalties(attached),
        on_step=after_step,
        signals=signals,
    )
    family.restore(idle)


def _latents(job: Job, streams: Sequence[Sequence[Sample]], accelerator: Accelerator) -> LatentCache:
    cache = LatentCache(cache_dir(), job.base_hash, next(job.family.parts["vae"].parameters()).dtype)
    seen = [view for stream in streams for sample in stream for view in sample.views]
    pictures: list[Picture] = list(seen)
    if job.inputs is not None:
        pictures += [picture for view in seen for picture in job.inputs.pictures(view)]
    with phase("Latents", len(pictures)) as advance, accelerator.main_process_first():
        cache.fill(job.family, pictures, lambda amount: advance(amount, ""))
    return cache


def _masks(job: Job, streams: Sequence[Sequence[Sample]]) -> Masks | None:
    """None where all of every photo counts."""
    if not job.masks:
        return None
    masks = Masks(job.masks, job.family.latent_factor, job.recipe.data.mask_floor)
    return masks.fill([view for sample in streams[0] for view in sample.views])


def _idle_parts(job: Job, encode_prompts: PromptEncoder) -> list[str]:
    """Frozen parts whose work is cached: they leave memory while the loop runs."""
    busy = {"denoiser", *job.recipe.method.part_names(job.family)}
    cached = isinstance(encode_prompts, PromptCache)
    return [part for part in job.family.parts if part not in busy and (part == "vae" or cached)]


def _streams(job: Job, accelerator: Accelerator) -> list[list[Sample]]:
    """Stream 0: the photos of all subjects. Stream 1, with a prior: class images of every noun, their loss weighted by
    lambda."""
    data, prior, seed = job.recipe.data, job.recipe.prior, job.recipe.run.seed
    subject = [
        Sample(
            views(photo, size, data.crop, data.crops, data.flip, seed),
            texts,
            1.0,
            data.caption_dropout,
            name,
        )
        for photo, size, texts, name in zip(job.photos, job.sizes, job.captions, job.names, strict=True)
    ]
    if not isinstance(prior, ClassImages):
        return [subject]
    nouns = job.class_nouns.items()
    return [subject, [sample for each in nouns for sample in _classes(job, prior, *each, accelerator)]]


def _classes(job: Job, prior: ClassImages, prompt: str, noun: str | None, accelerator: Accelerator) -> list[Sample]:
    """The class images of one noun, captioned with its class prompt."""
    pictures = class_images(
        job.family,
        prior,
        noun or "",
        job.resolution,
        job.base_hash,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.wait_for_everyone,
    )
    sizes = sorted(set(job.sizes))  # a class image stands beside photos of any bucket
    of = f" of {noun}" if len(job.class_nouns) > 1 else ""
    return [
        Sample(
            [view for size in sizes for view in views(picture, size, "center", 1, prior.flip, job.recipe.run.seed)],
            [prompt],
            prior.weight,
            prior.caption_dropout,
            f"class image {picture.path.name}{of}",
        )
        for picture in pictures
    ]


def _prompt_encoder(job: Job, streams: Sequence[Sequence[Sample]], accelerator: Accelerator) -> PromptEncoder:
    """Embeddings of frozen encoders are made once; encoders that train run in every step."""
    family = job.family
    if job.recipe.method.trains_texts(family):
        return family.encode_prompts
    prompts = [text for stream in streams for sample in stream for text in sample.captions]
    prompts += job.class_nouns  # the class prompts
    cache = PromptCache(
        family, job.base_hash, cache_dir(), next(family.parts[family.text_encoders[0]].parameters()).dtype
    )
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
            given=_given(job),
            advance=lambda amount: advance(amount, ""),
        )
    temporary = folder.with_name(f".{folder.name}.tmp")
    for (p, s), picture in zip(pairs, pictures, strict=True):
        about = (sample.negative, s, sample.sampler, sample.steps, sample.guidance, job.resolution)
        save_picture(picture, temporary / f"{p:02d}-{s}.png", parameters(prompts[p], *about, job.recipe.base.source))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _given(job: Job) -> Given:
    """What pictures are drawn from, by bases that draw from pictures: the first photo and what lies beside it."""
    view = views(job.photos[0], (job.resolution, job.resolution), "center", 1, False, job.recipe.run.seed)[0]
    return Given(unit(view.pixels())) if job.inputs is None else job.inputs.given(view)


def _load_result(job: Job, folder: RunFolder) -> None:
    job.recipe.method.attach(job.family, job.recipe.run.seed)
    job.recipe.method.load_state_dict(job.family, folder.result())


def _finish(job: Job, folder: RunFolder, device: torch.device, say: Say) -> None:
    dtype = next(job.family.parts["denoiser"].parameters()).dtype
    exported = export_run(folder, job.family)
    after = folder.path / "samples" / "after"
    shown = None if after.is_dir() else open_exported(folder, exported, dtype)
    if shown is not None:  # what is shown is what the file gives, not what was in memory
        shown.device = device
        job.family = shown
        _draw_samples(job, after, "After")
    write_companions(folder)
    write_report(folder.path)
    for item in exported:
        say(f"{item.format:>16}  {item.path}  {'; '.join(item.checks)}")
    failed = [item.format for item in exported if not item.ok]
    if failed:
        raise CheckFailed(f"the export to {', '.join(failed)} is not what was trained: see {folder.path}/report.html")
