"""The peak memory of this process, in bytes: with the pages of mapped files, or its own alone."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
EVERY = 0.05  # seconds


def peak_memory() -> int:
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def own_memory() -> int:
    """What is in memory now and in no file. Pages of mapped files are left out: the system takes them back whenever it
    needs them. 0 where it does not tell them apart."""
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text(encoding="utf-8")) if STATUS.is_file() else None
    return int(found[1]) * 1024 if found else 0


class OwnPeak:
    """Looks at `own_memory` twenty times a second, inside its block."""

    def __init__(self) -> None:
        self.peak = own_memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> OwnPeak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.peak = max(self.peak, own_memory())

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            self.peak = max(self.peak, own_memory())
