"""Follows a run: its events go to metrics, status and trackers, and a stop is heeded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput, Stopped
from finetune.core.events import (
    Consumer,
    Event,
    Measured,
    PhaseAdvanced,
    PhaseStarted,
    Restored,
    RunEnded,
    RunStarted,
    StepDone,
    emit,
    sent_to,
)
from finetune.core.signals import Interrupted, Stop
from finetune.runs.folder import RunFolder
from finetune.runs.metrics import MetricsFile
from finetune.runs.status import StatusFile
from finetune.verdicts.rows import VerdictsFile
from finetune.verdicts.rules import in_short

Say = Callable[[str], None]


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


@contextmanager
def followed(folder: RunFolder, accelerator: Accelerator, recipe: Recipe, hooks: Hooks) -> Iterator[None]:
    """Sends the block's events to metrics, status and trackers, and heeds a stop. At the end, sends the outcome."""
    consumers: list[Consumer] = []
    if accelerator.is_main_process:
        logged = (folder.path / "metrics.jsonl").is_file()
        consumers = [partial(_refuse_gone, folder.path)]
        consumers += [MetricsFile(folder.path), StatusFile(folder.path, recipe.run.steps)]
        consumers += [VerdictsFile(folder.path), partial(_say_restored, hooks.say, logged)]
        consumers += [partial(_say_measured, hooks.say)]
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


def _say_measured(say: Say, event: Event) -> None:
    """What a step has learned, and what it has changed besides."""
    if isinstance(event, Measured) and event.step:
        say(f"{'verdict':>16}  step {event.step}: {in_short(event.values)} ({event.verdict})")


def _track(accelerator: Accelerator, event: Event) -> None:
    """Logs a step to wandb, trackio or TensorBoard through Accelerate."""
    if isinstance(event, StepDone):
        accelerator.log({"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm}, step=event.step)
