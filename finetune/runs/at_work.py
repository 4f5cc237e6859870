"""Whether a process trains in a run folder. It needs no model library, so that other programs can ask often."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout


def is_at_work(run: Path) -> bool:
    """Whether a process trains in this folder now; one that ended, however it ended, does not."""
    if not (run / "run.lock").is_file():
        return False
    lock = FileLock(run / "run.lock", fallback_to_soft=False, preserve_lock_file=True)
    try:
        with lock.acquire(blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # no locks here, or no right to take one: nobody can train here either
        return False
