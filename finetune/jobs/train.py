"""A run from start to end: photos -> plan -> class images -> caches -> training -> exports -> images -> report.

The stages are here; what lies between plan and trained weights is in `jobs/fit.py`, the loop in `training/trainer.py`.
"""

from __future__ import annotations

import shlex
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from finetune.config.load import settled
from finetune.config.recipe import Recipe
from finetune.core.determinism import deterministic
from finetune.core.errors import BadInput, CheckFailed
from finetune.core.events import Consumer, sent_to
from finetune.core.logging import quieted
from finetune.core.progress import log, logged
from finetune.core.signals import Signals, Stop
from finetune.data.batches import check_split
from finetune.export.bench import Bench
from finetune.export.settings import UNCHECKED
from finetune.jobs.ask_images import ask_base
from finetune.jobs.companions import write_companions
from finetune.jobs.export import export_run
from finetune.jobs.fit import fit_job
from finetune.jobs.followed import Hooks, Say, followed
from finetune.jobs.hints import subject_hints
from finetune.jobs.images import draw_samples
from finetune.jobs.nodes import FolderChoice, in_first_order, recipe_of, refuse_other_inputs
from finetune.jobs.open import open_exported
from finetune.jobs.pins import Pins
from finetune.jobs.plan import plan
from finetune.jobs.prepare import Prepared, prepare
from finetune.jobs.run_record import listed_photos, record_of, started
from finetune.jobs.sharded import can_draw, refuse_unshared
from finetune.jobs.timestep_loss import measure_base, measure_trained
from finetune.jobs.verdicts import finish_verdicts
from finetune.report.html import write_report
from finetune.report.pictures import keep_photos
from finetune.runs.attention import FOLDER as ATTENTION
from finetune.runs.folder import RunFolder, is_run
from finetune.runs.inputs import read_inputs
from finetune.runs.plan import plan_lines
from finetune.training.accelerate import make_accelerator
from finetune.training.peers import joined, together

FINISHED = "nothing is left to train, all {steps} steps are done: exports and page are written and checked again"
LONGER = "; for more steps: finetune train {run}/recipe.yaml run.dir={run} run.steps=N"
_RUNNING = threading.Lock()


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
    if not _begun(Path(run_dir) if run_dir else recipe.run.dir):
        for hint in (*recipe.borrowed, *subject_hints(recipe)):
            hooks.say(f"{'hint':>16}  {hint}")
    recipe = settled(recipe, download=True)
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
        pins = Pins(path, hooks.accept_changes)
        held = _held(recipe, job, folder, pins) if main else nullcontext()
        with Signals(hooks.stop), held, followed(folder, accelerator, recipe, hooks):
            return _stages(job, folder, accelerator, hooks, pins)


@contextmanager
def _held(recipe: Recipe, job: Prepared, folder: RunFolder, pins: Pins) -> Iterator[None]:
    """Locks the folder. A run that is refused because of its inputs keeps its recipe and its status."""
    with folder.held(recipe):
        pins.check(job, folder.checkpoints.newest_step())
        folder.write_recipe(recipe)
        yield


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
    recipe = settled(recipe, download=True)
    accelerator = make_accelerator(recipe.run, recipe.method.is_adapter)
    check_split(recipe.run.batch_size, recipe.run.accumulate, processes or accelerator.num_processes)
    _check_machine(recipe, accelerator, recipe.run.dir)
    _check_folder(recipe, recipe.run.dir)
    return prepare(recipe, accelerator.device, _begun(recipe.run.dir))


def _begun(run_dir: Path | None) -> bool:
    """Whether this folder holds a run that can be continued."""
    return run_dir is not None and is_run(run_dir)


def _stages(job: Prepared, folder: RunFolder, accelerator: Accelerator, hooks: Hooks, pins: Pins) -> Path:
    recipe = job.recipe
    if accelerator.is_main_process:
        info = record_of(job).model_copy(update={"started": started(folder)})
        folder.write_info(info)
        keep_photos(folder.path, info, [job.photos[index] for index in listed_photos(job)])
    joined().wait()
    hooks.say(f"{'run folder':>16}  {folder.path}")
    for line in plan_lines(plan(job)):
        hooks.say(line)
    if joined().from_first(accelerator.is_main_process and folder.finished(recipe.run.steps)):
        hooks.say(f"{'note':>16}  {_finished(folder, recipe.run.steps)}")
        if accelerator.is_main_process:
            _load_result(job, folder)
    else:
        _train(job, folder, accelerator, hooks, pins)
    if accelerator.is_main_process:
        _finish(job, folder, accelerator.device, hooks.say)
    joined().wait()
    return folder.path


def _finished(folder: RunFolder, steps: int) -> str:
    longer = LONGER.format(run=shlex.quote(str(folder.path))) if folder.can_be_longer else ""
    return FINISHED.format(steps=steps) + longer


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


def _train(job: Prepared, folder: RunFolder, accelerator: Accelerator, hooks: Hooks, pins: Pins) -> None:
    """Draws the images from before training, trains, and saves the trained weights in RUN/adapter."""
    recipe = job.recipe
    refuse_unshared(recipe.run, folder.path)
    if accelerator.is_main_process and can_draw(job):
        if not (folder.path / "samples" / "before").is_dir():
            measure_base(job, folder.path)
            draw_samples(job, folder.path / "samples" / "before", "Before")
        ask_base(job, folder.path)
    if recipe.run.trackers:
        accelerator.init_trackers("finetune", config={"recipe": recipe.model_dump_json()})
    fit_job(job, folder, accelerator, stop=hooks.stop, pins=pins)
    if recipe.run.trackers:
        accelerator.end_training()
    if accelerator.is_main_process:
        shutil.rmtree(folder.path / "samples" / "after", ignore_errors=True)  # from a run with fewer steps
        about = {"base_hash": job.base_hash, "steps": str(recipe.run.steps)}
        folder.save_result(recipe.method.state_dict(job.family), about)


def _load_result(job: Prepared, folder: RunFolder) -> None:
    job.recipe.method.attach(job.family, job.recipe.run.seed)
    job.recipe.method.load_state_dict(job.family, folder.result())


def _finish(job: Prepared, folder: RunFolder, device: torch.device, say: Say) -> None:
    bench = Bench.of(job.family, job.recipe.base.load, job.recipe.export.verify)
    exported = export_run(folder, job.family, bench=bench)
    after = folder.path / "samples" / "after"
    shown = None if after.is_dir() or not can_draw(job) else open_exported(folder, exported, bench.dtype, bench)
    bench.close()
    if shown is not None:  # the report shows what the exported file draws, not the weights in memory
        shown.parts.device = device
        job.family = shown
        measure_trained(job, folder.path)
        draw_samples(job, after, "After", maps=folder.path / ATTENTION)
    for line in finish_verdicts(job, folder):
        say(f"{'verdict':>16}  {line}")
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
