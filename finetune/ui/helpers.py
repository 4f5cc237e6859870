"""The server's side of a chore: it starts the process, keeps what it says, and ends it if it takes too long."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from finetune.core.errors import BadInput
from finetune.core.reading import parse_json

AT_ONCE = 2  # processes
KEPT = 100  # chores whose results can be asked for
LONGEST = 1_800.0  # seconds
LONGEST_LINE = 16_000_000  # bytes: the findings of 2,000 photos
NO_ANSWER = "the work ended without an answer, as when memory is short: close other programs and try again"


@dataclass
class Ordered:
    """A chore that was asked for. `state` is "running", "done" or "failed"."""

    name: str
    given: dict[str, Any]
    state: str = "running"
    progress: list[Any] | None = None
    result: Any = None
    error: str = ""

    @property
    def told(self) -> dict[str, Any]:
        """What a page is told."""
        return {"state": self.state, "progress": self.progress, "result": self.result, "error": self.error}


class Helpers:
    """Chores by number; at most `AT_ONCE` work at the same time."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, Ordered] = OrderedDict()
        self._room = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def order(self, name: str, given: dict[str, Any]) -> str:
        """Starts a chore and returns its number."""
        number, chore = secrets.token_hex(8), Ordered(name, given)
        self._held[number] = chore
        while len(self._held) > KEPT:
            self._held.popitem(last=False)
        task = asyncio.create_task(self._run(chore))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return number

    async def done(self, name: str, given: dict[str, Any]) -> Any:
        """Does a chore and returns its result.

        Raises:
            BadInput: as the chore.
        """
        chore = Ordered(name, given)
        await self._run(chore)
        if chore.state == "failed":
            raise BadInput(chore.error)
        return chore.result

    def look(self, number: str) -> Ordered:
        """A chore by its number.

        Raises:
            BadInput: there is none, as after the server began anew.
        """
        if number not in self._held:
            raise BadInput("the server has begun anew since then: do this step again")
        return self._held[number]

    async def end(self) -> None:
        """Ends all that still works."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, chore: Ordered) -> None:
        async with self._room:
            try:
                await asyncio.wait_for(self._work(chore), LONGEST)
            except TimeoutError:
                chore.error = "this took too long and was ended: try it with less"
        if chore.state == "running":
            chore.state, chore.error = "failed", chore.error or NO_ANSWER

    async def _work(self, chore: Ordered) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "finetune.ui.chores", chore.name),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=LONGEST_LINE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(chore.given).encode())
            chore.given.pop("token", None)  # it was used: nothing keeps it
            process.stdin.close()
            async for line in process.stdout:
                _take(chore, line)
            await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def _take(chore: Ordered, line: bytes) -> None:
    said = parse_json(line.decode("utf-8"), "the chore's answer", dict)
    if "progress" in said:
        chore.progress = said["progress"]
    elif "error" in said:
        chore.state, chore.error = "failed", str(said["error"])
    elif "result" in said:
        chore.state, chore.result = "done", said["result"]
