"""Asks an ASGI application as a browser would, without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.ui.guard import TOKEN, Rules, local_hosts
from finetune.ui.pages import Pages, Rooms

HOST = "127.0.0.1:7870"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def told(self) -> Any:
        return json.loads(self.body)


class Browser:
    """A page that is open in a browser on this machine. `headers` replace its own; a value of None leaves one out."""

    def __init__(self, pages: Pages, app: Any) -> None:
        self.pages, self.app = pages, app

    async def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str | None] = {}) -> Answer:
        own = {"host": HOST, "sec-fetch-site": "same-origin", TOKEN: self.pages.rules.token, **headers}
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        where, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": where, "raw_path": where.encode(), "query_string": query.encode(), "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in own.items() if value is not None],
            "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 7870),
        }  # fmt: skip
        parts = [content[at : at + 65_536] for at in range(0, len(content), 65_536)] or [b""]
        sent = iter([{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts])
        got: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            found = next(sent, None)
            if found is None:
                await asyncio.Event().wait()  # the browser stays: it does not hang up
            return found or {}

        async def send(message: dict[str, Any]) -> None:
            got.append(message)

        await self.app(scope, receive, send)
        found = {name.decode(): value.decode() for name, value in got[0]["headers"]}
        return Answer(got[0]["status"], found, b"".join(each.get("body", b"") for each in got[1:]))

    async def get(self, path: str, **headers: str | None) -> Answer:
        return await self.ask("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    async def post(self, path: str, body: Any = None) -> Answer:
        return await self.ask("POST", path, body)

    async def put(self, path: str, body: bytes) -> Answer:
        return await self.ask("PUT", path, body)

    async def chore(self, number: str) -> Any:
        while (told := (await self.get(f"/api/chores/{number}")).told)["state"] == "running":
            await asyncio.sleep(0.1)
        return told


@asynccontextmanager
async def opened(folder: Path, password: str = "") -> AsyncIterator[Browser]:
    """The page over folders in `folder`, from the server's start to its end."""
    rooms = Rooms(folder / "finetune-ui", folder / "runs", folder / "bases")
    rooms.own.mkdir(exist_ok=True)
    pages = Pages(rooms, Rules(local_hosts(7870), password))
    app = pages.app()
    async with app.router.lifespan_context(app):
        yield Browser(pages, app)
