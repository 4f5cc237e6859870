"""The addresses of the page: what can be asked, and what is answered."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from finetune import __version__
from finetune.core.errors import BadInput
from finetune.core.reading import parse_json
from finetune.report.look import STYLE
from finetune.ui.drafts import Draft, base_of, bases_in, draft_of
from finetune.ui.guard import Guard, Rules
from finetune.ui.helpers import Helpers
from finetune.ui.plain_words import without_places
from finetune.ui.run_views import RunViews
from finetune.ui.started import Starter
from finetune.ui.uploads import Uploads

STATIC = Path(__file__).parent / "static"
REPORT_POLICY = "sandbox allow-same-origin; default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'"
MOST_TOLD = 1_000_000  # bytes of JSON in a request
Answer = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Rooms:
    """The folders that the page uses: its own, that of the runs, and that of the bases to choose from."""

    own: Path
    runs: Path
    bases: Path


class Pages:
    """Answers the requests. All state is in folders, but for chores that were asked for and curves that are open."""

    def __init__(self, rooms: Rooms, rules: Rules) -> None:
        self.rooms, self.rules = rooms, rules
        self.uploads = Uploads(rooms.own)
        self.starter = Starter(rooms.runs, rooms.own / "logs")
        self.views = RunViews(self.starter)
        self.helpers: Helpers | None = None

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/", self.page),
            Route("/page.css", self.style),
            Route("/page.js", self.script),
            Route("/api/home", _told(self.home)),
            Route("/api/sets", _told(self.new_set), methods=["POST"]),
            Route("/api/sets/{set}", _told(self.photos)),
            Route("/api/sets/{set}/files", _told(self.add_file), methods=["PUT"]),
            Route("/api/sets/{set}/{what:str}", _told(self.change_set), methods=["POST"]),
            Route("/api/sets/{set}/small/{file}", _told(self.small)),
            Route("/api/chores/{number}", _told(self.chore)),
            Route("/api/base", _told(self.inspect), methods=["POST"]),
            Route("/api/recipe", _told(self.recipe), methods=["POST"]),
            Route("/api/plan", _told(self.plan), methods=["POST"]),
            Route("/api/start", _told(self.start), methods=["POST"]),
            Route("/api/lora", _told(self.verify), methods=["PUT"]),
            Route("/api/runs/{run}", _told(self.run)),
            Route("/api/runs/{run}/live", _told(self.live)),
            Route("/api/runs/{run}/{what}", _told(self.change_run), methods=["POST"]),
            Route("/runs/{run}/report.html", _told(self.report)),
            Route("/runs/{run}/samples/{folder}/{file}", _told(self.image)),
            Route("/runs/{run}/files/{path:path}", _told(self.download)),
        ]
        return Starlette(routes=routes, middleware=[Middleware(Guard, rules=self.rules)], lifespan=self._life)

    @asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        self.helpers = Helpers()
        yield
        await self.helpers.end()

    @property
    def _helpers(self) -> Helpers:
        assert self.helpers is not None, "the application has not begun"
        return self.helpers

    async def page(self, request: Request) -> Response:
        text = (STATIC / "page.html").read_text(encoding="utf-8")
        return Response(text.replace("{{token}}", self.rules.token), media_type="text/html")

    async def style(self, request: Request) -> Response:
        return Response(STYLE + (STATIC / "page.css").read_text(encoding="utf-8"), media_type="text/css")

    async def script(self, request: Request) -> Response:
        return FileResponse(STATIC / "page.js", media_type="text/javascript")

    async def home(self, request: Request) -> Any:
        """The list of runs, photos that were sent, and bases."""
        runs = await run_in_threadpool(self.views.listed)
        bases = sorted(bases_in(self.rooms.bases))
        return {"runs": runs, "sets": self.uploads.sets()[:20], "bases": bases, "version": __version__}

    async def new_set(self, request: Request) -> Any:
        return {"set": self.uploads.new_set()}

    async def photos(self, request: Request) -> Any:
        """What was left out of a set; what is in it, a check tells."""
        return {"left_out": self.uploads.left_out(request.path_params["set"])}

    async def add_file(self, request: Request) -> Any:
        """Takes one file as the body of the request; its name is ?name=."""
        chosen, name = request.path_params["set"], request.query_params.get("name", "")
        photos = self.uploads.photos_of(chosen)
        if not name.lower().endswith(".zip"):
            return {"added": [await self.uploads.add(chosen, name, request.stream())], "unused": []}
        file = await self.uploads.take_zip(name, request.stream())
        try:
            given = {"zip": str(file), "photos": str(photos), "name": name}
            return await self._helpers.done("unpack", given)
        finally:
            file.unlink(missing_ok=True)

    async def change_set(self, request: Request) -> Any:
        """check: looks at the photos; out: leaves one out or takes it back; caption: writes one."""
        chosen, what, values = request.path_params["set"], request.path_params["what"], await _values(request)
        photos, name = self.uploads.photos_of(chosen), str(values.get("name", ""))
        if what == "check":
            small = self.uploads.small_of(chosen)
            given = {"photos": str(photos), "small": str(small), "resolution": _whole(values.get("resolution"), 512)}
            return {"chore": self._helpers.order("check", given)}
        if what == "out":
            self.uploads.leave_out(chosen, name, bool(values.get("out")))
        elif what == "caption":
            self.uploads.caption(chosen, name, str(values.get("text", "")))
        else:
            raise BadInput("the server knows nothing of this: load the page again")
        return {"done": True}

    async def small(self, request: Request) -> Any:
        folder = self.uploads.small_of(request.path_params["set"])
        wanted = request.path_params["file"]
        found = [file for file in folder.iterdir() if file.name == wanted] if folder.is_dir() else []
        if not found or not wanted.endswith(".jpg"):
            raise BadInput("there is no such image: check the photos again")
        return FileResponse(found[0], media_type="image/jpeg", headers={"cache-control": "private, max-age=60"})

    async def chore(self, request: Request) -> Any:
        return self._helpers.look(request.path_params["number"]).told

    async def inspect(self, request: Request) -> Any:
        values = await _values(request)
        base = base_of(values.get("base"), bases_in(self.rooms.bases))
        return {"chore": self._helpers.order("inspect", {"base": base, "like": str(values.get("like", "")) or None})}

    async def recipe(self, request: Request) -> Any:
        """The recipe and the command of what is chosen so far."""
        draft = await self._draft(request)
        return {"command": draft.command(), "recipe": await run_in_threadpool(draft.as_yaml), "name": draft.recipe}

    async def plan(self, request: Request) -> Any:
        draft = await self._draft(request)
        given = {"recipe": draft.recipe, "settings": draft.settings(), "name": draft.run_name}
        pace = await run_in_threadpool(self.views.pace, draft.base)
        return {"chore": self._helpers.order("plan", given), "command": draft.command(), "pace": pace}

    async def start(self, request: Request) -> Any:
        """Starts the run of a plan: what was seen is what is started."""
        plan = self._helpers.look(str((await _values(request)).get("plan", "")))
        if plan.name != "plan" or plan.state != "done":
            raise BadInput("the plan is not ready: wait for it, then start")
        wish = [plan.given["recipe"], *plan.given["settings"]]
        return {"run": self.starter.train(wish, plan.given["name"])}

    async def verify(self, request: Request) -> Any:
        """Looks at a LoRA file that was dropped, and removes it again."""
        file = await self.uploads.take_lora(request.query_params.get("name", ""), request.stream())
        try:
            return await self._helpers.done("verify", {"file": str(file)})
        finally:
            shutil.rmtree(file.parent, ignore_errors=True)

    async def run(self, request: Request) -> Any:
        return await run_in_threadpool(self.views.about, request.path_params["run"])

    async def live(self, request: Request) -> Any:
        return await run_in_threadpool(self.views.live, request.path_params["run"])

    async def change_run(self, request: Request) -> Any:
        """stop, resume, or export a checkpoint."""
        name, what, values = request.path_params["run"], request.path_params["what"], await _values(request)
        folder = self.views.folder(name)
        if what == "export":
            step = values.get("step")
            given = {"run": str(folder), "step": None if step is None else _whole(step, 0)}
            return {"chore": self._helpers.order("export", given)}
        if what not in ("stop", "resume"):
            raise BadInput("the server knows nothing of this: load the page again")
        await run_in_threadpool(self.starter.stop if what == "stop" else self.starter.resume, name)
        return {"done": True}

    async def report(self, request: Request) -> Any:
        folder = self.views.folder(request.path_params["run"])
        file = folder / "report.html"
        if not file.is_file() or file.is_symlink():
            raise BadInput("the run has no report yet: it is written at the end")
        return FileResponse(file, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})

    async def image(self, request: Request) -> Any:
        names = (request.path_params[key] for key in ("run", "folder", "file"))
        file = self.views.image(*names)
        return FileResponse(file, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    async def download(self, request: Request) -> Any:
        file = self.views.export(request.path_params["run"], request.path_params["path"])
        if file.is_file():
            return _attached(file, file.name)
        packed = await run_in_threadpool(self.uploads.packed, file)
        return _attached(packed, f"{file.name}.zip", BackgroundTask(packed.unlink))

    async def _draft(self, request: Request) -> Draft:
        values = await _values(request)
        photos = self.uploads.photos_of(str(values.get("set", "")))
        return draft_of(
            values, _relative(photos), {name: _relative(path) for name, path in bases_in(self.rooms.bases).items()}
        )


def _attached(file: Path, name: str, after: BackgroundTask | None = None) -> Response:
    """A file that the browser keeps and does not show."""
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(name)}"}
    return FileResponse(file, media_type="application/octet-stream", headers=headers, background=after)


def _told(answer: Callable[[Request], Awaitable[Any]]) -> Answer:
    """What is refused is told in one sentence, without places of this machine."""

    async def responding(request: Request) -> Response:
        try:
            found = await answer(request)
        except BadInput as error:
            return JSONResponse({"error": without_places(str(error))}, status_code=422)
        except OSError as error:
            sentence = f"the disk refused this ({error.strerror or 'unknown error'}): free some space, or try again"
            return JSONResponse({"error": sentence}, status_code=507)
        return found if isinstance(found, Response) else JSONResponse(found)

    return responding


async def _values(request: Request) -> dict[str, Any]:
    """The JSON object of a request."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_TOLD:
            raise BadInput("this is more than a page sends: load it again")
    return parse_json(body.decode("utf-8", "replace") or "{}", "the request", dict, "load the page again")


def _whole(value: Any, default: int) -> int:
    return value if type(value) is int and 0 <= value < 10**9 else default


def _relative(path: Path) -> Path:
    """As a command would name it, from here; without a place of this machine if possible."""
    here = Path.cwd()
    return path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path
