"""The position of this process among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _nobody() -> None:
    """Returns at once: there is no other process to wait for."""


@dataclass(frozen=True)
class Processes:
    """This process has number `rank` (from 0) of `world` processes. `wait` returns when all of them have called it."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = _nobody


ALONE = Processes()
