"""The job: photos -> plan -> class images -> caches -> training -> pictures -> exports -> page.

Each stage is a function here and can be read on its own; the loop is in `finetune.loop`.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from finetune.config.recipe import Recipe
from finetune.core.determinism import deterministic
from finetune.core.errors import CheckFailed, Stopped
from finetune.core.signals import Interrupted, Signals
from finetune.data.batches import Batches
from finetune.data.cache import PromptCache
from finetune.data.samplers import BucketSampler, ShuffleSampler
from finetune.jobs.companions import write_companions
from finetune.jobs.dataset import cache_latents, load_masks, make_prompt_encoder, make_streams
from finetune.jobs.export import export_run
from finetune.jobs.images import draw_samples
from finetune.jobs.open import open_exported
from finetune.jobs.plan import plan
from finetune.jobs.prepare import Prepared, prepare
from finetune.jobs.previews import from_file
from finetune.objectives.registry import build_objective
from finetune.report.html import write_report
from finetune.runs.folder import RunFolder, next_folder
from finetune.training.accelerate import make_accelerator
from finetune.training.regularizers import PriorContext
from finetune.training.step import PromptEncoder
from finetune.training.trainer import fit

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
    job = prepare(recipe, accelerator.device)
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


def _stages(job: Prepared, folder: RunFolder, accelerator: Accelerator, say: Say, signals: Signals) -> Path:
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


def _info(job: Prepared, before: dict[str, Any]) -> dict[str, Any]:
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


def _train(job: Prepared, folder: RunFolder, accelerator: Accelerator, signals: Signals) -> None:
    """The pictures of before, the training, and the trained weights in RUN/adapter."""
    recipe = job.recipe
    if accelerator.is_main_process and not (folder.path / "samples" / "before").is_dir():
        draw_samples(job, folder.path / "samples" / "before", "Before")
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
    job: Prepared,
    folder: RunFolder,
    accelerator: Accelerator,
    on_step: Callable[[int], None] | None = None,
    signals: Signals | None = None,
) -> None:
    """Class images, caches, the method attached, and the loop: what is trained ends in `job.family`."""
    recipe, family = job.recipe, job.family
    streams = make_streams(job, accelerator)
    cache = cache_latents(job, streams, accelerator)
    encode_prompts = make_prompt_encoder(job, streams, accelerator)
    idle = _idle_parts(job, encode_prompts)
    busy = [part for part in family.parts if part not in idle]
    family.release(idle)
    family.place(busy)
    trained = recipe.method.attach(family, recipe.run.seed)
    if recipe.run.gradient_checkpointing:
        family.enable_gradient_checkpointing(recipe.method.part_names(family))
    run = recipe.run
    kind = BucketSampler if recipe.data.shape == "buckets" else ShuffleSampler
    batches = Batches(
        streams,
        cache,
        run.seed,
        run.batch_size,
        run.accumulate,
        accelerator.process_index,
        accelerator.num_processes,
        kind(streams, run.seed, run.batch_size),
        load_masks(job, streams),
        job.inputs,
    )
    attached = PriorContext(family, recipe.method, trained, encode_prompts, job.class_prompt, job.class_prompts)

    def after_step(step: int) -> None:
        if recipe.sample.every and step % recipe.sample.every == 0 and accelerator.is_main_process:
            with from_file(folder, family, step):
                draw_samples(job, folder.path / "samples" / f"step-{step:06d}", "Preview", count=1)
            family.release(idle)
            family.place(busy)
        if on_step is not None:
            on_step(step)

    fit(
        accelerator=accelerator,
        family=family,
        trained=trained,
        objective=build_objective(recipe.objective, family.schedule, family.shift(job.resolution)),
        encode_prompts=encode_prompts,
        batches=batches,
        optim=recipe.optim,
        run=run,
        folder=folder,
        stratify=batches.samples_per_step if recipe.objective.timesteps == "stratified" else None,
        encoder_dropout=recipe.data.encoder_dropout,
        windows=recipe.method.windows(trained),
        regularizers=recipe.prior.regularizers(attached),
        on_step=after_step,
        signals=signals,
    )
    family.restore(idle)


def _idle_parts(job: Prepared, encode_prompts: PromptEncoder) -> list[str]:
    """Frozen parts whose work is cached: they leave memory while the loop runs."""
    busy = {"denoiser", *job.recipe.method.part_names(job.family)}
    cached = isinstance(encode_prompts, PromptCache)
    return [part for part in job.family.parts if part not in busy and (part == "vae" or cached)]


def _load_result(job: Prepared, folder: RunFolder) -> None:
    job.recipe.method.attach(job.family, job.recipe.run.seed)
    job.recipe.method.load_state_dict(job.family, folder.result())


def _finish(job: Prepared, folder: RunFolder, device: torch.device, say: Say) -> None:
    dtype = next(job.family.parts["denoiser"].parameters()).dtype
    exported = export_run(folder, job.family)
    after = folder.path / "samples" / "after"
    shown = None if after.is_dir() else open_exported(folder, exported, dtype)
    if shown is not None:  # what is shown is what the file gives, not what was in memory
        shown.device = device
        job.family = shown
        draw_samples(job, after, "After")
    write_companions(folder)
    write_report(folder.path)
    for item in exported:
        say(f"{item.format:>16}  {item.path}  {'; '.join(item.checks)}")
    failed = [item.format for item in exported if not item.ok]
    if failed:
        raise CheckFailed(f"the export to {', '.join(failed)} is not what was trained: see {folder.path}/report.html")
