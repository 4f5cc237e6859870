"""Typed events that a run sends while it works. Progress bars, logs and reports are consumers of events.

The caller chooses the consumers: `with sent_to(consumer): ...`. Code inside the block needs no argument for them:
`emit` and `phase` find the consumers in their context (`contextvars`). Two runs in two threads do not share consumers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PhaseStarted:
    """A phase of work began. `total` is its number of units, such as 250 steps or 96 images, or 0
    if that is not known; `unit` is their name."""

    title: str
    total: int
    unit: str = ""


@dataclass(frozen=True)
class PhaseAdvanced:
    """`amount` more units of the phase are done. `note` is a short text to display, such as "loss 0.1234"."""

    title: str
    amount: int
    note: str = ""


@dataclass(frozen=True)
class PhaseEnded:
    """The phase ended, by success or by an error."""

    title: str


@dataclass(frozen=True)
class RunStarted:
    """The run in `folder` began; it trains up to `steps` optimiser steps."""

    folder: Path
    steps: int


@dataclass(frozen=True)
class Restored:
    """Training continues after optimiser step `step` (0: it starts from the beginning)."""

    step: int


@dataclass(frozen=True)
class StepDone:
    """One optimiser step is done. `loss` is the mean over all processes; `seconds` is the wall time of the step."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class CheckpointSaved:
    """The checkpoint of `step` is complete in `folder`."""

    step: int
    folder: Path


@dataclass(frozen=True)
class ImagesDrawn:
    """Images of the sample prompts are in `folder`: those before or after training, or a preview at one step."""

    folder: Path


@dataclass(frozen=True)
class Measured:
    """The model was compared with its base after `step` (`finetune.verdicts`): measures by name. `verdict` is what
    they say in a word, such as "undertrained"."""

    step: int
    values: Mapping[str, float]
    seconds: float
    verdict: str = ""


@dataclass(frozen=True)
class Judged:
    """What was measured last, at `step`, and the word for it: where a run goes on, and at its end."""

    step: int
    values: Mapping[str, float]
    verdict: str


@dataclass(frozen=True)
class RunEnded:
    """The run ended. `outcome` is "finished", "stopped" (it can be resumed) or "failed"."""

    folder: Path
    outcome: str


Event = (
    PhaseStarted
    | PhaseAdvanced
    | PhaseEnded
    | RunStarted
    | Restored
    | StepDone
    | CheckpointSaved
    | ImagesDrawn
    | Measured
    | Judged
    | RunEnded
)
Consumer = Callable[[Event], None]

_consumers: ContextVar[tuple[Consumer, ...]] = ContextVar("finetune_event_consumers", default=())


@contextmanager
def sent_to(*consumers: Consumer) -> Iterator[None]:
    """Sends events from inside the block to these consumers too, in this order.

    An error that a consumer raises ends the work in the block, after the other consumers have had the event. So the
    status of a run is right, whatever a caller's consumer does.
    """
    token = _consumers.set((*_consumers.get(), *consumers))
    try:
        yield
    finally:
        _consumers.reset(token)


def emit(event: Event) -> None:
    """Sends an event to every consumer of the current context, or to none if there are none."""
    errors = []
    for consumer in _consumers.get():
        try:
            consumer(event)
        except BaseException as error:  # a signal's too
            errors.append(error)
    if errors:
        raise errors[0]


@contextmanager
def phase(title: str, total: int, unit: str = "") -> Iterator[Callable[[int, str], None]]:
    """Sends the events of a phase with `total` units, and gives the function that reports progress.

    Example: `with phase("Training", 250, "steps") as advance: advance(1, "loss 0.12")`. `PhaseEnded` follows an error
    too.
    """

    def advance(amount: int, note: str = "") -> None:
        emit(PhaseAdvanced(title, amount, note))

    emit(PhaseStarted(title, total, unit))
    try:
        yield advance
    finally:
        emit(PhaseEnded(title))


@contextmanager
def one_step(title: str) -> Iterator[None]:
    """A phase of one unit, such as the reading of a base."""
    with phase(title, 1) as advance:
        yield
        advance(1, "")
