"""One process among those that train together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _nobody() -> None:
    """There is no other process to wait for."""


@dataclass(frozen=True)
class Processes:
    """This process is number `rank` (from 0) of `world`; `wait` returns when all of them have called it."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = _nobody


ALONE = Processes()
