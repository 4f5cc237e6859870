"""Several processes on this machine, each running the same command: `finetune train RECIPE --processes 2`."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from finetune.core.signals import STOPPING

# Windows sends Ctrl-C to every process of the console itself, and os.kill there ends a process without a signal
CONSOLE_TELLS_ALL = os.name == "nt"
GRACE = 10.0  # seconds for the other processes to end by themselves after one has failed


Command = Callable[[list[str]], tuple[int, str]]


def launch(processes: int, run: Command, arguments: list[str]) -> tuple[int, str]:
    """Calls `run(arguments)` in each process and returns one exit code and message for all of them.

    When one process fails, torch.multiprocessing ends the others. Signals that stop a run are passed on to all
    processes, so that they finish the step together. The same message from several processes is shown once.
    """
    import torch.multiprocessing as multiprocessing

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    said = multiprocessing.get_context("spawn").SimpleQueue()
    work = (processes, _free_port(), run, arguments, said)
    context: Any = multiprocessing.start_processes(_work, work, processes, join=False, start_method="spawn")
    with _signals_passed_on(context.pids()):
        failure = _join(context)
    lines: list[str] = []
    while not said.empty():
        lines.append(said.get())
    if failure is None:
        return 0, ""
    return _explained(context, failure, "\n".join(dict.fromkeys(lines)))


def _work(rank: int, world: int, port: int, run: Command, arguments: list[str], said: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    code, message = run(arguments)
    if message:
        said.put(message)
    sys.exit(code)


@contextmanager
def _signals_passed_on(pids: list[int]) -> Iterator[None]:
    def handle(number: int, frame: object) -> None:
        for pid in () if CONSOLE_TELLS_ALL else pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _join(context: Any) -> Exception | None:
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    try:
        while True:
            with suppress(InterruptedError):  # Windows: a signal, whose handler has run
                if context.join(grace_period=GRACE):
                    return None
    except (ProcessExitedException, ProcessRaisedException) as failure:
        return failure


def _explained(context: Any, failure: Exception, said: str) -> tuple[int, str]:
    """The exit code and message of a failed run. A process that a signal killed cannot report itself: this does."""
    codes = [process.exitcode for process in context.processes]
    for rank, code in enumerate(codes):
        if code is not None and code < 0 and -code not in STOPPING:
            name = signal.Signals(-code).name
            return 2, (
                f"error: process {rank} of {len(codes)} was ended by {name} (SIGKILL: often a lack of memory); the "
                "others were stopped and the last checkpoint is complete: go on with `finetune resume RUN`"
            )
    stated = [code for code in codes if code in (1, 2, *(128 + number for number in STOPPING))]
    if said and stated:
        return max(stated), said
    raise failure from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
