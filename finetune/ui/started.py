"""Runs as processes of their own: they live on when the page or its server ends."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

from finetune.core.errors import BadInput
from finetune.core.files import write_json
from finetune.core.reading import read_json
from finetune.runs.at_work import is_at_work
from finetune.ui.plain_words import without_places

NAME = re.compile(r"[\w][\w .-]{0,99}")
LOG_TAIL = 20_000  # bytes of a log that are read
ON_ITS_OWN = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "DETACHED_PROCESS", 0)


class Starter:
    """Starts, continues and stops runs in the folder `runs`; keeps their logs in `logs`."""

    def __init__(self, runs: Path, logs: Path) -> None:
        self.runs, self.logs = runs, logs
        self._own: dict[str, subprocess.Popen[bytes]] = {}

    def train(self, wish: list[str], name: str) -> str:
        """Starts `finetune train` with these arguments in a new run folder, and returns the folder's name."""
        self.runs.mkdir(parents=True, exist_ok=True)
        chosen = self._reserved(name)
        self._start(chosen, ["train", *wish, f"run.dir={(self.runs / chosen).as_posix()}"])
        return chosen

    def resume(self, name: str) -> None:
        """Continues a run.

        Raises:
            BadInput: it is at work.
        """
        if self.is_own_child(name) or is_at_work(self.runs / name):
            raise BadInput(f"{name} is at work already: wait until it ends, or stop it first")
        self._start(name, ["resume", (self.runs / name).as_posix()])

    def stop(self, name: str) -> None:
        """Asks a run to end after its current step; it can be continued.

        Raises:
            BadInput: it is not at work, or another machine runs it.
        """
        folder, process = self.runs / name, self._own.get(name)
        if process is not None and process.poll() is None:
            process.terminate()
            return
        if not is_at_work(folder) or not (folder / "status.json").is_file():
            raise BadInput(f"{name} is not at work: there is nothing to stop")
        status = read_json(folder / "status.json", dict)
        number = status.get("process")
        if status.get("host") != platform.node() or not isinstance(number, int) or number <= 1:
            raise BadInput(f"{name} runs on another machine: stop it there")
        os.kill(number, signal.SIGTERM)

    def is_own_child(self, name: str) -> bool:
        """Whether this server started the run, and it has not ended."""
        process = self._own.get(name)
        return process is not None and process.poll() is None

    def was_started(self, name: str) -> bool:
        """Whether a page started this run, now or before."""
        return self._record(name).is_file()

    def command(self, name: str) -> str:
        """The command that started it; empty for a run of the command line."""
        record = self._record(name)
        try:
            return str(read_json(record, dict).get("command", "")) if record.is_file() else ""
        except BadInput:
            return ""

    def log(self, name: str) -> list[str]:
        """The last lines that the run's process printed, without places of this machine."""
        file = self.logs / f"{name}.log"
        if not file.is_file() or file.is_symlink():
            return []
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - LOG_TAIL))
            text = opened.read(LOG_TAIL).decode("utf-8", "replace")
        return [without_places(line) for line in text.splitlines() if line.strip()][-60:]

    def _reserved(self, name: str) -> str:
        """The first free name; the folder is made at once, so that two pages never get the same."""
        base = re.sub(r"[^\w-]+", "-", name).strip("-_.")[:60] or "run"
        for number in range(1, 10_000):
            chosen = base if number == 1 else f"{base}-{number}"
            try:
                (self.runs / chosen).mkdir()
            except FileExistsError:
                continue
            return chosen
        raise BadInput(f"there are 10,000 runs called {base}: give another name")

    def _start(self, name: str, arguments: list[str]) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        if not self.was_started(name):  # what began it, and not what continued it
            write_json(self._record(name), {"command": shown_command(arguments)})
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        with (self.logs / f"{name}.log").open("wb") as log:
            self._own[name] = subprocess.Popen(
                [sys.executable, "-m", "finetune", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                creationflags=ON_ITS_OWN,
            )

    def _record(self, name: str) -> Path:
        return self.logs / f"{name}.json"


def shown_command(arguments: list[str]) -> str:
    """The command as a person would type it, without places of this machine."""
    import shlex

    return without_places(" ".join(shlex.quote(word) for word in ("finetune", *arguments)))
