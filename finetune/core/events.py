"""What a run tells while it works: typed events. A progress bar, a log, a page are consumers of them.

Who runs something says where its events go: `with sent_to(consumer): ...`. What works deep inside then needs no
argument for it: `emit` and `phase` reach the consumer of their own context (`contextvars`), so that two runs in two
threads do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PhaseStarted:
    """A stretch of work with a known number of units, such as 250 steps or 96 images."""

    title: str
    total: int


@dataclass(frozen=True)
class PhaseAdvanced:
    """`amount` more units of the phase are done; `note` is for a person, such as "loss 0.1234"."""

    title: str
    amount: int
    note: str = ""


@dataclass(frozen=True)
class PhaseEnded:
    title: str


@dataclass(frozen=True)
class RunStarted:
    folder: Path
    steps: int


@dataclass(frozen=True)
class Restored:
    """Training goes on after `step` (0: from the start)."""

    step: int


@dataclass(frozen=True)
class StepDone:
    """One optimiser step. `loss` is the mean over all processes; `seconds` is the step's wall time."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class CheckpointSaved:
    step: int
    folder: Path


@dataclass(frozen=True)
class ImagesDrawn:
    """Images of the sample prompts: before, after, or a preview of a step."""

    folder: Path


@dataclass(frozen=True)
class RunEnded:
    """`outcome`: "finished", "stopped" (it can go on) or "failed"."""

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
    | RunEnded
)
Consumer = Callable[[Event], None]

_consumers: ContextVar[tuple[Consumer, ...]] = ContextVar("finetune_event_consumers", default=())


@contextmanager
def sent_to(*consumers: Consumer) -> Iterator[None]:
    """Inside the block events also go to these consumers, in this order.

    An error of one ends the work, once the others have had the event: the status of a run is true, whatever a caller's
    consumer does.
    """
    token = _consumers.set((*_consumers.get(), *consumers))
    try:
        yield
    finally:
        _consumers.reset(token)


def emit(event: Event) -> None:
    errors = []
    for consumer in _consumers.get():
        try:
            consumer(event)
        except BaseException as error:  # a signal's too
            errors.append(error)
    if errors:
        raise errors[0]


@contextmanager
def phase(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """`with phase("Training", 250) as advance: advance(1, "loss 0.12")`."""

    def advance(amount: int, note: str = "") -> None:
        emit(PhaseAdvanced(title, amount, note))

    emit(PhaseStarted(title, total))
    try:
        yield advance
    finally:
        emit(PhaseEnded(title))
