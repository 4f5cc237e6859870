"""A run from start to end: photos -> plan -> class images -> caches -> training -> exports -> images -> report.

Each stage is a function in this module. The training loop is in `training/trainer.py`.
"""

from __future__ import annotations

import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from finetune.config.recipe import Recipe
from finetune.core.determinism import deterministic
from finetune.core.errors import BadInput, CheckFailed, Stopped
from finetune.core.events import (
    Consumer,
    Event,
    PhaseAdvanced,
    PhaseStarted,
    Restored,
    RunEnded,
    RunStarted,
    StepDone,
    emit,
    sent_to,
)
from finetune.core.logging import quieted
from finetune.core.progress import log, logged
from finetune.core.signals import Interrupted, Signals, Stop
from finetune.data.batches import check_split
from finetune.data.cache import PromptCache
from finetune.export.settings import UNCHECKED
from finetune.jobs.companions import write_companions
from finetune.jobs.dataset import cache_latents, make_batches, make_prompt_encoder, make_streams
from finetune.jobs.export import export_run
from finetune.jobs.images import draw_preview, draw_samples, preview_folder
from finetune.jobs.nodes import (
    FolderChoice,
    in_first_order,
    recipe_of,
    refuse_other_class_images,
    refuse_other_inputs,
)
from finetune.jobs.open import open_exported
from finetune.jobs.pins import Pins
from finetune.jobs.plan import plan
from finetune.jobs.prepare import Prepared, prepare
from finetune.objectives.registry import build_objective
from finetune.report.html import write_report
from finetune.report.pictures import keep_class_images, keep_photos
from finetune.runs.folder import RunFolder
from finetune.runs.inputs import read_inputs
from finetune.runs.metrics import MetricsFile
from finetune.runs.plan import plan_rows
from finetune.runs.record import RecordedSubject, RunRecord
from finetune.runs.status import StatusFile
from finetune.training.accelerate import make_accelerator
from finetune.training.peers import joined, together
from finetune.training.regularizers import PriorContext
from finetune.training.step import PromptEncoder, Step, StepOptions, parts_of
from finetune.training.trainer import Trainable, Trainer

Say = Callable[[str], None]
_RUNNING = threading.Lock()


@dataclass(frozen=True)
class Hooks:
    """How a caller follows and ends a run.

    `say` gets lines of text for the user, and `events` gets typed events on the main process. `stop.request()`, from
    any thread, ends the run after its current step, or at the next unit of work outside the loop.
    """

    say: Say = lambda line: None
    events: Consumer = lambda event: None
    stop: Stop = field(default_factory=Stop)
    accept_changes: bool = False


def train(
    recipe: Recipe,
    run_dir: Path | str | None = None,
    say: Say = log,
    *,
    events: Consumer = lambda event: None,
    stop: Stop | None = None,
    accept_changes: bool = False,
) -> Path:
    """Runs a recipe from start to end, or continues an interrupted run of it.

    What it does is logged to "finetune" with level INFO: a line when a phase begins and ends, and every 30 seconds
    between, with step, loss, speed and time left. If the application has not configured logging, the lines are shown
    while this runs (`finetune.core.progress.logged`). Other libraries' warnings and bars are hidden meanwhile.

    Args:
        recipe: what to run.
        run_dir: the run folder; None for `run.dir`, or else a new folder in runs/. If it holds a run of this recipe,
            that run continues.
        say: gets lines of text for the user: the plan, the exported files. By default they are logged too.
        events: gets the typed events of `finetune.core.events`, on the main process.
        stop: `stop.request()`, from any thread, ends the run after its current step; outside the loop at the next
            unit of a phase, such as an image (with several processes: after the first step).
        accept_changes: continue although photos, captions, the base or packages changed since the run began. This is
            written into its record (`RUN/inputs.json`).

    Returns:
        The run folder.

    Raises:
        BadInput: the recipe, the photos, the base or the folder can't be used; what the run began with changed; or
            another run is active in this Python process.
        CheckFailed: the loss or gradient of a step was not finite, or an export did not pass its checks.
        Stopped: SIGINT, SIGTERM or `stop` ended the run; `resume` continues it.
        OSError: a file can't be written, for example because the disk is full.
    """
    if not isinstance(recipe, Recipe):
        raise BadInput(f"train needs a recipe, not {recipe!r:.80}: make one with finetune.load_recipe(NAME)")
    _refuse_no_folder(run_dir, "run_dir")
    with _alone_in_this_process(), deterministic(recipe.run.deterministic), quieted(), logged(), together():
        return _train_here(recipe, run_dir, Hooks(say, events, stop or Stop(), accept_changes))


def _refuse_no_folder(value: Any, name: str, needed: bool = False) -> None:
    """`needed`: None is refused too."""
    good = isinstance(value, str | Path) and str(value) != "" and "\0" not in str(value)
    if not good and (needed or value is not None):
        raise BadInput(f"{name} is {value!r:.80}: give the folder of a run, as a text or a path")


@contextmanager
def _alone_in_this_process() -> Iterator[None]:
    """Refuses a second run in this process: both would share torch's global seed and deterministic mode."""
    if not _RUNNING.acquire(blocking=False):
        raise BadInput(
            "another run is active in this Python process: wait until it ends, or start this one in another process"
        )
    try:
        yield
    finally:
        _RUNNING.release()


def _train_here(recipe: Recipe, run_dir: Path | str | None, hooks: Hooks) -> Path:
    accelerator = make_accelerator(recipe.run, recipe.method.is_adapter)
    main = accelerator.is_main_process
    folder_choice = FolderChoice(recipe, run_dir, joined())
    known = folder_choice.known()
    _check_machine(recipe, accelerator, known)
    if main:  # other machines need not have the folder
        _check_folder(recipe, known)
    begun = joined().from_first(_begun(known))
    job = prepare(recipe, accelerator.device, begun)
    with sent_to(*([hooks.events] if main else [])):
        path = folder_choice.chosen()
        accelerator.project_configuration.project_dir = accelerator.project_configuration.logging_dir = str(path)
        folder = RunFolder(path)
        job = in_first_order(job, path, joined())
        refuse_other_inputs(job, joined())
        held = folder.held(recipe) if main else nullcontext()
        with Signals(hooks.stop), held, _followed(folder, accelerator, recipe, hooks):
            return _stages(job, folder, accelerator, hooks)


def _check_machine(recipe: Recipe, accelerator: Accelerator, run_dir: Path | None) -> None:
    """Refuses what the optimiser can't do here: now rather than after minutes of drawing."""
    recipe.optim.check_device(accelerator.device.type)
    folder = RunFolder(run_dir) if run_dir is not None and _begun(run_dir) else None
    if folder is None or not folder.finished(recipe.run.steps):
        recipe.optim.try_on(accelerator.device)


def _check_folder(recipe: Recipe, run_dir: Path | None) -> None:
    """Refuses what the run folder can't take: now rather than after a base of gigabytes was loaded."""
    if run_dir is not None:
        RunFolder(run_dir).check(recipe)
        RunFolder(run_dir).check_place()
        read_inputs(run_dir)


def check_run(recipe: Recipe, processes: int | None = None) -> Prepared:
    """Prepares a run and refuses all that `train` would refuse before its first step, but writes nothing.

    Args:
        processes: how many the run will have, if it is to be launched with more than are running now.

    Raises:
        BadInput: as `train`, except for what shows only on the way: a changed input, a full disk.
    """
    accelerator = make_accelerator(recipe.run, recipe.method.is_adapter)
    check_split(recipe.run.batch_size, recipe.run.accumulate, processes or accelerator.num_processes)
    _check_machine(recipe, accelerator, recipe.run.dir)
    _check_folder(recipe, recipe.run.dir)
    return prepare(recipe, accelerator.device, _begun(recipe.run.dir))


def _begun(run_dir: Path | None) -> bool:
    """Whether this folder holds a run that can be continued."""
    return run_dir is not None and (run_dir / "recipe.yaml").is_file()


@contextmanager
def _followed(folder: RunFolder, accelerator: Accelerator, recipe: Recipe, hooks: Hooks) -> Iterator[None]:
    """Sends the block's events to metrics, status and trackers, and heeds a stop. At the end, sends the outcome."""
    consumers: list[Consumer] = []
    if accelerator.is_main_process:
        logged = (folder.path / "metrics.jsonl").is_file()
        consumers = [partial(_refuse_gone, folder.path)]
        consumers += [MetricsFile(folder.path), StatusFile(folder.path, recipe.run.steps)]
        consumers += [partial(_say_restored, hooks.say, logged)]
        consumers += [partial(_track, accelerator)] if recipe.run.trackers else []
    if accelerator.num_processes == 1:  # of several, one alone must not leave: the loop agrees on it
        consumers += [partial(_heed, hooks.stop)]
    outcome = "failed"
    with sent_to(*consumers):
        try:
            emit(RunStarted(folder.path, recipe.run.steps))
            yield
            outcome = "finished"
        except Interrupted as stop:
            outcome = "stopped"
            raise Stopped(folder.path, stop.number) from stop
        finally:
            emit(RunEnded(folder.path, outcome))


def _refuse_gone(run: Path, event: Event) -> None:
    """Ends a run whose folder is no longer there: else it would train on, and have nowhere to go on from."""
    if isinstance(event, StepDone | PhaseStarted | PhaseAdvanced) and not (run / "recipe.yaml").is_file():
        raise BadInput(
            f"{run} was removed or moved while its run was at work: put it back and go on with `finetune resume`, or "
            "begin again"
        )


def _heed(stop: Stop, event: Event) -> None:
    """Ends the work that is not the loop's at its next unit, as a signal does; the loop looks after each step."""
    if isinstance(event, RunStarted | PhaseAdvanced):
        stop.heed()


def _say_restored(say: Say, logged: bool, event: Event) -> None:
    """From where a run goes on; `logged`: it had begun before."""
    if isinstance(event, Restored) and event.step:
        say(f"{'resumes':>16}  after step {event.step}")
    elif isinstance(event, Restored) and logged:
        say(f"{'resumes':>16}  from the start: none of its checkpoints can be used")


def _track(accelerator: Accelerator, event: Event) -> None:
    """Logs a step to wandb, trackio or TensorBoard through Accelerate."""
    if isinstance(event, StepDone):
        accelerator.log({"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm}, step=event.step)


def _stages(job: Prepared, folder: RunFolder, accelerator: Accelerator, hooks: Hooks) -> Path:
    recipe = job.recipe
    pins = Pins(folder.path, hooks.accept_changes)
    if accelerator.is_main_process:
        pins.check(job, folder.checkpoints.newest_step())
        info = _info(job).model_copy(update={"started": _started(folder)})
        folder.write_info(info)
        keep_photos(folder.path, info)
    joined().wait()
    hooks.say(f"{'run folder':>16}  {folder.path}")
    for name, value in plan_rows(plan(job)).items():
        hooks.say(f"{name:>16}  {value}")
    if joined().from_first(accelerator.is_main_process and folder.finished(recipe.run.steps)):
        if accelerator.is_main_process:
            _load_result(job, folder)
    else:
        _train(job, folder, accelerator, hooks, pins)
    if accelerator.is_main_process:
        _finish(job, folder, accelerator.device, hooks.say)
    joined().wait()
    return folder.path


def resume(
    run_dir: Path | str,
    say: Say = log,
    *,
    events: Consumer = lambda event: None,
    stop: Stop | None = None,
    accept_changes: bool = False,
) -> Path:
    """Continues an interrupted run. The result is the same as without the interruption.

    Returns:
        The run folder.

    Raises:
        BadInput: `run_dir` is not a run folder; and as `train`.
        CheckFailed, Stopped, OSError: as `train`.
    """
    _refuse_no_folder(run_dir, "run_dir", needed=True)
    with together() as peers:
        recipe = recipe_of(Path(run_dir), peers)
    return train(recipe, run_dir, say, events=events, stop=stop, accept_changes=accept_changes)


def _started(folder: RunFolder) -> float | None:
    """When the run began: its record says it, and a resumed run does not begin again. None where that is lost."""
    if not (folder.path / "run.json").is_file():
        return float(round(time.time()))
    try:
        return folder.info.started
    except BadInput:  # it is damaged, and about to be written again
        return None


def _info(job: Prepared) -> RunRecord:
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    several = [
        RecordedSubject(token=s.token, class_noun=s.noun, photos=len(s.photos), style=s.trigger) for s in job.subjects
    ]
    planned = plan(job)
    return RunRecord(
        token=job.token,
        class_noun=job.noun,
        style=job.subjects[0].trigger,
        family=job.family.name,
        base=job.recipe.base.source,
        base_hash=job.base_hash,
        resolution=job.resolution,
        plan=plan_rows(planned),
        planned=planned,
        captions=job.captions,
        captions_from_files=job.captions_from_files,
        photos=[photo.path.as_posix() for photo in job.photos],
        subjects=several if len(several) > 1 else [],
        prompts=job.sample_prompts(),
        guidance=job.recipe.sample.guidance,
        image_guidance=job.recipe.sample.image_guidance,
        reads=list(job.family.drawing.wants.needed),
        versions={name: version(name) for name in packages} | {"python": platform.python_version()},
    )


def _train(job: Prepared, folder: RunFolder, accelerator: Accelerator, hooks: Hooks, pins: Pins) -> None:
    """Draws the images from before training, trains, and saves the trained weights in RUN/adapter."""
    recipe = job.recipe
    if accelerator.is_main_process and not (folder.path / "samples" / "before").is_dir():
        draw_samples(job, folder.path / "samples" / "before", "Before")
    if recipe.run.trackers:
        accelerator.init_trackers("finetune", config={"recipe": recipe.model_dump_json()})
    fit_job(job, folder, accelerator, stop=hooks.stop, pins=pins)
    if recipe.run.trackers:
        accelerator.end_training()
    if accelerator.is_main_process:
        shutil.rmtree(folder.path / "samples" / "after", ignore_errors=True)  # from a run with fewer steps
        about = {"base_hash": job.base_hash, "steps": str(recipe.run.steps)}
        folder.save_result(recipe.method.state_dict(job.family), about)


def fit_job(
    job: Prepared,
    folder: RunFolder,
    accelerator: Accelerator,
    on_step: Callable[[int], None] = lambda step: None,
    stop: Stop | None = None,
    pins: Pins | None = None,
) -> None:
    """Draws class images, fills the caches, attaches the method and trains. `job.family` holds the trained weights.

    `on_step` is called after every step, with the number of steps done. `stop` ends the loop after its current step.

    Raises:
        BadInput: the class images, or a checkpoint in `folder`, can't be used.
        CheckFailed: the loss or gradient of a step was not finite.
        Interrupted: `stop` was requested, or a signal arrived.
    """
    recipe, family = job.recipe, job.family
    streams = make_streams(job)
    if pins is not None and accelerator.is_main_process:
        pins.check_class_images(streams, folder.checkpoints.newest_step())
    if accelerator.is_main_process and len(streams) > 1:
        keep_class_images(folder.path, [sample.crops[0].photo.path for sample in streams[1]])
    refuse_other_class_images(streams, joined())
    cache = cache_latents(job, streams)
    encode_prompts = make_prompt_encoder(job, streams)
    idle = _idle_parts(job, encode_prompts)
    family.parts.release(idle)
    family.parts.place([part for part in family.parts if part not in idle])
    trained = recipe.method.attach(family, recipe.run.seed)
    if recipe.run.gradient_checkpointing:
        family.enable_gradient_checkpointing(recipe.method.part_names(family))
    batches = make_batches(job, streams, cache)
    trainer = Trainer(
        _make_step(job, trained, encode_prompts, batches.samples_per_step),
        Trainable(trained, recipe.method.windows(trained)),
        recipe.optim,
        recipe.run,
        accelerator,
        folder.checkpoints,
    )

    def preview(step: int) -> None:
        if accelerator.is_main_process:
            with trainer.result_weights():
                draw_preview(job, folder, step, idle)
        joined().wait()

    def is_due(step: int) -> bool:
        return bool(recipe.sample.every) and step % recipe.sample.every == 0

    def after_step(step: int) -> None:
        if is_due(step):
            preview(step)
        on_step(step)

    def after_restore(step: int) -> None:
        # lost if a kill or a stop came between the checkpoint and its preview
        if is_due(step) and joined().from_first(not preview_folder(folder, step).is_dir()):
            preview(step)

    trainer.fit(batches, after_step, stop, after_restore)
    family.parts.restore(idle)


def _make_step(
    job: Prepared, trained: dict[str, nn.Parameter], encode_prompts: PromptEncoder, samples_per_step: int
) -> Step:
    """The forward pass of the recipe: objective, regularizers, dropout of text encoders."""
    recipe, family = job.recipe, job.family
    class_prompts = job.class_prompt, job.class_prompts, job.class_prompt_of_caption
    context = PriorContext(family, recipe.method, trained, encode_prompts, *class_prompts)
    options = StepOptions(
        recipe.data.encoder_dropout,
        recipe.prior.regularizers(context),
        samples_per_step if recipe.objective.timesteps == "stratified" else None,
    )
    objective = build_objective(recipe.objective, family.schedule, family.shift(job.resolution))
    return Step(family, parts_of(trained), objective, encode_prompts, options)


def _idle_parts(job: Prepared, encode_prompts: PromptEncoder) -> list[str]:
    """Frozen parts whose outputs are cached. They are removed from memory during the training loop."""
    busy = {"denoiser", *job.recipe.method.part_names(job.family)}
    cached = isinstance(encode_prompts, PromptCache)
    return [part for part in job.family.parts if part not in busy and (part in job.family.codec.parts or cached)]


def _load_result(job: Prepared, folder: RunFolder) -> None:
    job.recipe.method.attach(job.family, job.recipe.run.seed)
    job.recipe.method.load_state_dict(job.family, folder.result())


def _finish(job: Prepared, folder: RunFolder, device: torch.device, say: Say) -> None:
    dtype = job.family.parts.dtype("denoiser")
    exported = export_run(folder, job.family)
    after = folder.path / "samples" / "after"
    shown = None if after.is_dir() else open_exported(folder, exported, dtype)
    if shown is not None:  # the report shows what the exported file draws, not the weights in memory
        shown.parts.device = device
        job.family = shown
        draw_samples(job, after, "After")
    write_companions(folder)
    write_report(folder.path)
    for item in exported:
        lines = [check.line for check in item.checks] or [UNCHECKED]
        say(f"{item.format:>16}  {item.path}  {'; '.join([*lines, *item.limits])}")
    failed = [item.format for item in exported if not item.ok]
    if failed:
        raise CheckFailed(
            f"the export to {', '.join(failed)} does not match what was trained: see {folder.path}/report.html"
        )
