"""The processes of one run: they wait for each other's work without a limit, agree on facts, and fail together.

Work of unknown length (caching, class images, exports, previews) is waited for through the launcher's key-value store,
not in a collective operation: those have a timeout, and a process in one can't notice that another one failed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from finetune.core.errors import BadInput, CheckFailed, Stopped
from finetune.core.processes import ALONE, Processes
from finetune.core.reading import parse_json
from finetune.core.signals import Interrupted

COLLECTIVE = timedelta(minutes=10)  # the longest that one process may be behind another within a step
LINGER = 3.0  # seconds for the others to hear of a failure before the process that holds the store ends
LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun and `--processes` set
NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
CUT = ("connection", "timed out", "nccl", "gloo", "socket", "broken pipe")  # words of a group that lost a member


class Peers:
    """This process and the others of its run; alone, every method returns at once."""

    def __init__(self, rank: int = 0, world: int = 1, store: Any = None, heartbeat: Any = None) -> None:
        self.rank, self.world = rank, world
        self._store, self._heartbeat = store, heartbeat
        self._runs = self._count = 0
        self._prefix = "finetune/0"

    def wait(self) -> None:
        """Returns when all processes have called it, however long that takes. The first one returns last, as it may
        hold the store.

        Raises:
            BadInput, CheckFailed, Interrupted: another process failed or was stopped; with its sentence.
        """
        if self.world == 1:
            return
        key = self._key("wait")
        self._store.add(key, 1)
        self._until(lambda: bool(self._store.add(key, 0) >= self.world))
        if self.rank:
            self._store.add(f"{key}/left", 1)
        else:
            self._until(lambda: bool(self._store.add(f"{key}/left", 0) >= self.world - 1))

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, in their order. They are what JSON holds."""
        if self.world == 1:
            return [value]
        key = self._key("gather")
        self._store.set(f"{key}/{self.rank}", json.dumps([value]))
        self.wait()
        found = [_sent(self._store.get(f"{key}/{rank}")) for rank in range(self.world)]
        self.wait()
        return found

    def from_first(self, value: Any) -> Any:
        """Returns the first process's value, which JSON can hold, on all of them."""
        if self.world == 1:
            return value
        key = self._key("first")
        if self.rank == 0:
            self._store.set(key, json.dumps([value]))
        self.wait()
        found = _sent(self._store.get(key)) if self.rank else value
        self.wait()
        return found

    def of_folder(self, folder: Path) -> Processes:
        """The position of this process among those that see the same `folder`: all, or those of one machine.

        Each process leaves a mark there and looks for those of the others. The folder is created.
        """
        if self.world == 1:
            return ALONE
        folder.mkdir(parents=True, exist_ok=True)
        name = self.from_first(secrets.token_hex(8))
        marks = [folder / f".process-{name}-{rank}.tmp" for rank in range(self.world)]
        marks[self.rank].touch()
        try:
            self.wait()
            there = [rank for rank, mark in enumerate(marks) if mark.is_file()]
            self.wait()
        finally:
            marks[self.rank].unlink(missing_ok=True)
        return Processes(there.index(self.rank), len(there), self.wait)

    @contextmanager
    def in_a_run(self) -> Iterator[None]:
        """Inside the block the processes work on one run: what ends one of them ends all, with the same sentence."""
        self._runs, self._count = self._runs + 1, 0
        self._prefix = f"finetune/{self._runs}"
        self._heartbeat.begin(self._prefix)
        try:
            yield
        except (BadInput, CheckFailed, Stopped, Interrupted) as error:
            self._announce(error)
            raise
        except Exception as error:
            self._explain(error)
            raise
        finally:
            self._heartbeat.end()

    def _key(self, kind: str) -> str:
        self._count += 1
        return f"{self._prefix}/{kind}/{self._count}"

    def _until(self, done: Callable[[], bool]) -> None:
        pause = 0.002
        while not self._asked(done):
            if self._heartbeat.failure is not None or self._failed():
                _raise(self._heartbeat.failure or self._store.get(f"{self._prefix}/failed").decode())
            time.sleep(pause)
            pause = min(2 * pause, 0.2)

    def _failed(self) -> bool:
        return self._asked(lambda: bool(self._store.check([f"{self._prefix}/failed"])))

    def _asked(self, question: Callable[[], bool]) -> bool:
        try:
            return question()
        except RuntimeError as error:
            if self._heartbeat.failure is not None:
                _raise(self._heartbeat.failure)
            raise _lost() from error

    def _announce(self, error: BaseException, kind: str | None = None) -> None:
        """Tells the others why this process ends; the first one to fail is heard."""
        number = getattr(error, "number", 0)
        kind = kind or ("stopped" if number else "check" if isinstance(error, CheckFailed) else "input")
        said = json.dumps([kind, str(number or error), platform.node()])
        try:
            if not getattr(error, "announced", False):
                self._store.compare_set(f"{self._prefix}/failed", "", said)
            self._store.add(f"{self._prefix}/heard", 1)
            end = time.monotonic() + LINGER
            while (
                self.rank == 0 and time.monotonic() < end and self._store.add(f"{self._prefix}/heard", 0) < self.world
            ):
                time.sleep(0.05)
        except RuntimeError:  # the store is gone, and with it the process or the agent that held it
            return

    def _explain(self, error: Exception) -> None:
        """Turns what a collective operation says of a lost member into that member's own sentence."""
        if not isinstance(error, RuntimeError) or not any(word in str(error).lower() for word in CUT):
            told = BadInput(f"process {self.rank} of {self.world} failed ({type(error).__name__}: {error})")
            self._announce(told, "input")
            return
        end = time.monotonic() + LINGER
        while time.monotonic() < end and self._heartbeat.failure is None:
            time.sleep(0.1)
        if self._heartbeat.failure is not None:
            _raise(self._heartbeat.failure, error)
        raise _lost() from error


def _sent(value: bytes) -> Any:
    return parse_json(value.decode(), "what another process sent", list)[0]


def _raise(said: str, cause: BaseException | None = None) -> NoReturn:
    """What another process announced, as an error of this one."""
    kind, what, *host = parse_json(said, "what another process announced", list)
    elsewhere = f"on {host[0]}: " if host and host[0] != platform.node() else ""
    error: BaseException = BadInput(f"{elsewhere}{what}")
    if kind == "stopped":
        error = Interrupted(int(what))
    elif kind == "check":
        error = CheckFailed(f"{elsewhere}{what}")
    elif kind == "lost":
        error = _lost()
    error.announced = True  # type: ignore[attr-defined]
    raise error from cause


def _lost() -> BadInput:
    return BadInput(
        "another process of the run ended, or can't be reached any more; the last checkpoint is complete: go on with "
        "`finetune resume RUN`"
    )


_ALONE = Peers()
_JOINED: list[Peers] = []


def joined() -> Peers:
    """This process among those that the launcher started. The first call joins them, and waits until all have come.

    Raises:
        BadInput: the environment has some of a launcher's variables, but not all.
    """
    _refuse_half_a_launch()
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        return _ALONE
    if not _JOINED:
        _JOINED.append(_join())
    return _JOINED[0]


def _refuse_half_a_launch() -> None:
    """Notebooks and job schedulers leave variables behind that torch and Accelerate take for a launch of several."""
    world, local = os.environ.get("WORLD_SIZE") or "1", os.environ.get("LOCAL_RANK") or "-1"
    if world in ("0", "1") and local == "-1":
        return
    missing = [name for name in LAUNCH if not os.environ.get(name)]
    wrong = [name for name in NUMBERS if not re.fullmatch(r"-?\d+", os.environ.get(name) or "0")]
    if missing or wrong:
        name = "LOCAL_RANK" if world in ("0", "1") else "WORLD_SIZE"
        fault = f"{wrong[0]} is no number" if wrong else f"without {' and '.join(missing)}"
        raise BadInput(
            f"the environment has {name}={os.environ[name]}, as of a launch of several processes, but {fault}: for a "
            "single process `unset WORLD_SIZE RANK LOCAL_RANK`, for several use `finetune train --processes N` or "
            "torchrun"
        )


@contextmanager
def together() -> Iterator[Peers]:
    """Inside the block the processes work on one run: what ends one of them ends all, with the same sentence."""
    peers = joined()
    if peers.world == 1:
        yield peers
        return
    with peers.in_a_run():
        yield peers


def on_cpu() -> bool:
    """Whether Accelerate is to use the CPU."""
    import torch

    return not torch.cuda.is_available() and not torch.backends.mps.is_available()


def launch_store() -> Any:
    """The store of torchrun's agent, which outlives the workers that it restarts; None without one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return _connect()


def _connect() -> Any:
    from torch import distributed

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    connect: Any = getattr(distributed, "TCPStore")  # noqa: B009 - it is not in the type information
    return connect(*place, is_master=False, wait_for_workers=False, timeout=COLLECTIVE)


def _own_place() -> dict[str, Any]:
    """Where restarted workers meet. torchrun's static rendezvous keeps its store over restarts, with the addresses of
    the workers that are gone; torch takes the store to be a new one, and would connect to them."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    from torch.distributed.distributed_c10d import PrefixStore

    store = PrefixStore(f"finetune/attempt-{attempt}", _connect())
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


def _join() -> Peers:
    from accelerate.state import PartialState
    from torch.distributed.distributed_c10d import PrefixStore, broadcast_object_list

    from finetune.core.launcher import end_with_launcher
    from finetune.training.heartbeat import Heartbeat

    end_with_launcher()
    state = PartialState(cpu=on_cpu(), timeout=COLLECTIVE, **_own_place())
    name = [secrets.token_hex(8)]  # restarted workers meet in the same store
    broadcast_object_list(name, 0, device=state.device)
    own, theirs = (PrefixStore(name[0], _connect()) for _ in range(2))
    heartbeat = Heartbeat(theirs, state.process_index, state.num_processes)
    peers = Peers(state.process_index, state.num_processes, own, heartbeat)
    heartbeat.sign()
    peers.wait()
    heartbeat.start()
    return peers
