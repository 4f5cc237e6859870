"""The addresses of the page: what can be asked, and what is answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from finetune import __version__
from finetune.core.errors import BadInput
from finetune.report.look import STYLE
from finetune.ui.answers import body_of, sent_file, told_in_words, values_of, whole_number
from finetune.ui.cards import card_page
from finetune.ui.changes import KINDS, Changes
from finetune.ui.drafts import TINY_SIDE, Draft, base_of, bases_in, draft_of
from finetune.ui.guard import Guard, Rules
from finetune.ui.helpers import Helpers
from finetune.ui.kept_drafts import LARGEST_RECIPE, KeptDrafts
from finetune.ui.lora_pages import LoraPages
from finetune.ui.prompt_box import Drawings, wish_of
from finetune.ui.pushing import files_to_send, push_of
from finetune.ui.run_views import RunViews
from finetune.ui.started import Starter
from finetune.ui.uploads import MOST_FILES, Uploads

STATIC = Path(__file__).parent / "static"
REPORT_POLICY = "sandbox allow-same-origin; default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'"


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
        self.changes = Changes(self.uploads)
        self.drafts = KeptDrafts(self.uploads)
        self.starter = Starter(rooms.runs, rooms.own / "logs")
        self.views = RunViews(self.starter)
        self.drawings = Drawings(rooms.own)
        self.helpers: Helpers | None = None

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/", self.page),
            Route("/page.css", self.style),
            Route("/{file:str}.js", told_in_words(self.script)),
            Route("/api/home", told_in_words(self.home)),
            Route("/api/sets", told_in_words(self.new_set), methods=["POST"]),
            Route("/api/sets/{set}", told_in_words(self.photos)),
            Route("/api/sets/{set}/files", told_in_words(self.add_file), methods=["PUT"]),
            Route("/api/sets/{set}/{what:str}", told_in_words(self.change_set), methods=["POST"]),
            Route("/api/sets/{set}/small/{file}", told_in_words(self.small)),
            Route("/api/chores/{number}", told_in_words(self.chore)),
            Route("/api/base", told_in_words(self.inspect), methods=["POST"]),
            Route("/api/recipe", told_in_words(self.recipe), methods=["POST"]),
            Route("/api/recipes", told_in_words(self.add_recipe), methods=["PUT"]),
            Route("/api/settings", told_in_words(self.settings), methods=["POST"]),
            Route("/api/plan", told_in_words(self.plan), methods=["POST"]),
            Route("/api/start", told_in_words(self.start), methods=["POST"]),
            *LoraPages(self.uploads, self.rooms.bases, lambda: self._helpers).routes(),
            Route("/api/runs/{run}", told_in_words(self.run)),
            Route("/api/runs/{run}/live", told_in_words(self.live)),
            Route("/api/runs/{run}/drawn", told_in_words(self.drawn)),
            Route("/api/runs/{run}/push", told_in_words(self.to_send)),
            Route("/api/drawn/{name}/remove", told_in_words(self.remove_drawing), methods=["POST"]),
            Route("/drawn/{name}/{side}/{file}", told_in_words(self.drawn_image)),
            Route("/api/runs/{run}/{what}", told_in_words(self.change_run), methods=["POST"]),
            Route("/runs/{run}/report.html", told_in_words(self.report)),
            Route("/runs/{run}/card.html", told_in_words(self.card)),
            Route("/runs/{run}/samples/{folder}/{file}", told_in_words(self.image)),
            Route("/runs/{run}/files/{path:path}", told_in_words(self.download)),
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

    async def script(self, request: Request) -> Any:
        wanted = f"{request.path_params['file']}.js"
        found = [file for file in STATIC.glob("*.js") if file.name == wanted]
        if not found:
            raise BadInput("the page has no such part: load it again")
        return FileResponse(found[0], media_type="text/javascript")

    async def home(self, request: Request) -> Any:
        """The list of runs, photos that were sent, and bases."""
        runs = await run_in_threadpool(self.views.listed)
        bases = sorted(bases_in(self.rooms.bases))
        return {
            "runs": runs,
            "sets": await run_in_threadpool(self.drafts.listed),
            "bases": bases,
            "tiny_side": TINY_SIDE,
            "version": __version__,
        }

    async def new_set(self, request: Request) -> Any:
        return {"set": self.uploads.new_set()}

    async def photos(self, request: Request) -> Any:
        """What was left out of a set, changed in it, and filled in beside it; what is in it, a check tells."""
        chosen = request.path_params["set"]
        told = {"left_out": self.uploads.left_out(chosen), "changed": self.changes.of(chosen)}
        return told | {"draft": self.drafts.of(chosen)}

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
        """check: looks at the photos; try: what a crop or a mask would do, keep: does it, undo: takes it back;
        out: leaves one out or takes it back; caption: writes one; draft: keeps what was filled in."""
        chosen, what, values = request.path_params["set"], request.path_params["what"], await values_of(request)
        photos, name = self.uploads.photos_of(chosen), str(values.get("name", ""))
        if what == "check":
            small = self.uploads.small_of(chosen)
            given = {
                "photos": str(photos),
                "small": str(small),
                "resolution": whole_number(values.get("resolution"), 512),
            }
            return {"chore": self._helpers.order("check", given)}
        if what == "try":
            return {"chore": self._helpers.order("try", self._trial(chosen, values))}
        if what == "keep":
            return {"name": self.changes.keep(chosen, name, str(values.get("change", "")))}
        if what == "undo":
            return {"name": self.changes.undo(chosen, name)}
        if what == "draft":
            self.drafts.keep(chosen, values)
        elif what == "out":
            self.uploads.leave_out(chosen, name, bool(values.get("out")))
        elif what == "caption":
            self.uploads.caption(chosen, name, str(values.get("text", "")))
        else:
            raise BadInput("the server knows nothing of this: load the page again")
        return {"done": True}

    def _trial(self, chosen: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the chore of a trial is given."""
        names, what = values.get("names"), str(values.get("change", ""))
        if not isinstance(names, list) or not names or len(names) > MOST_FILES:
            raise BadInput("no photo was named: load the page again")
        tried = {str(name): str(self.changes.tried(chosen, str(name), what)) for name in names}
        folders = {"photos": str(self.uploads.photos_of(chosen)), "small": str(self.uploads.small_of(chosen))}
        return {
            **folders,
            "tried": tried,
            "what": what,
            "resolution": whole_number(values.get("resolution"), 512) or 512,
        }

    async def small(self, request: Request) -> Any:
        folder = self.uploads.small_of(request.path_params["set"])
        tried = request.query_params.get("tried", "")
        folder = folder / tried if tried in KINDS else folder
        wanted = request.path_params["file"]
        found = [file for file in folder.iterdir() if file.name == wanted] if folder.is_dir() else []
        if not found or not wanted.endswith(".jpg"):
            raise BadInput("there is no such image: check the photos again")
        return FileResponse(found[0], media_type="image/jpeg", headers={"cache-control": "private, max-age=60"})

    async def chore(self, request: Request) -> Any:
        return self._helpers.look(request.path_params["number"]).told

    async def inspect(self, request: Request) -> Any:
        values = await values_of(request)
        base = base_of(values.get("base"), bases_in(self.rooms.bases))
        return {"chore": self._helpers.order("inspect", {"base": base, "like": str(values.get("like", "")) or None})}

    async def recipe(self, request: Request) -> Any:
        """The recipe and the command of what is chosen so far."""
        draft = await self._draft(request)
        return {"command": draft.command(), "recipe": await run_in_threadpool(draft.as_yaml), "name": draft.recipe}

    async def add_recipe(self, request: Request) -> Any:
        """Takes a recipe file as the body of the request."""
        return await run_in_threadpool(self.drafts.take_recipe, await body_of(request, LARGEST_RECIPE))

    async def settings(self, request: Request) -> Any:
        """Every setting that a page may change, and what the recipe would choose for a base."""
        values = await values_of(request)
        base = base_of(values.get("base"), bases_in(self.rooms.bases))
        return await run_in_threadpool(_settings, str(values.get("kind")), base, str(values.get("like", "")))

    async def plan(self, request: Request) -> Any:
        draft = await self._draft(request)
        given = {"recipe": draft.recipe, "settings": draft.settings(), "name": draft.run_name}
        pace = await run_in_threadpool(self.views.pace, draft.base)
        return {"chore": self._helpers.order("plan", given), "command": draft.command(), "pace": pace}

    async def start(self, request: Request) -> Any:
        """Starts the run of a plan: what was seen is what is started."""
        plan = self._helpers.look(str((await values_of(request)).get("plan", "")))
        if plan.name != "plan" or plan.state != "done":
            raise BadInput("the plan is not ready: wait for it, then start")
        wish = [plan.given["recipe"], *plan.given["settings"]]
        return {"run": self.starter.train(wish, plan.given["name"])}

    async def run(self, request: Request) -> Any:
        return await run_in_threadpool(self.views.about, request.path_params["run"])

    async def live(self, request: Request) -> Any:
        return await run_in_threadpool(self.views.live, request.path_params["run"])

    async def change_run(self, request: Request) -> Any:
        """stop, resume, export a checkpoint, draw with one, or push the files to the hub."""
        name, what, values = request.path_params["run"], request.path_params["what"], await values_of(request)
        folder = self.views.folder(name)
        if what == "export":
            step = values.get("step")
            asked = {"run": str(folder), "step": None if step is None else whole_number(step, 0)}
            return {"chore": self._helpers.order("export", asked)}
        if what == "draw":
            wish = asdict(wish_of(values, self.views.folder))
            given = {"wish": wish, "runs": str(self.rooms.runs), "folder": str(self.drawings.new())}
            return {"chore": self._helpers.order("draw", given)}
        if what == "push":
            return {"chore": self._helpers.order("push", push_of(values, folder))}
        if what not in ("stop", "resume"):
            raise BadInput("the server knows nothing of this: load the page again")
        await run_in_threadpool(self.starter.stop if what == "stop" else self.starter.resume, name)
        return {"done": True}

    async def drawn(self, request: Request) -> Any:
        """What was drawn with a run, the newest first."""
        run = self.views.folder(request.path_params["run"]).name
        return {"drawn": await run_in_threadpool(self.drawings.of, run)}

    async def to_send(self, request: Request) -> Any:
        """What a push would send."""
        return {"files": await run_in_threadpool(files_to_send, self.views.folder(request.path_params["run"]))}

    async def drawn_image(self, request: Request) -> Any:
        where = request.path_params
        file = self.drawings.image(where["name"], f"{where['side']}/{where['file']}")
        return FileResponse(file, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    async def remove_drawing(self, request: Request) -> Any:
        await run_in_threadpool(self.drawings.remove, request.path_params["name"])
        return {"done": True}

    async def card(self, request: Request) -> Any:
        """The model card, as the hub would show it."""
        page = await run_in_threadpool(card_page, self.views.folder(request.path_params["run"]))
        return Response(page, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})

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
        return await sent_file(
            self.uploads, self.views.export(request.path_params["run"], request.path_params["path"])
        )

    async def _draft(self, request: Request) -> Draft:
        values = await values_of(request)
        photos = self.uploads.photos_of(str(values.get("set", "")))
        bases = {name: _relative(path) for name, path in bases_in(self.rooms.bases).items()}
        file = self.drafts.recipe(str(values.get("file", "")))
        return draft_of(values, _relative(photos), bases, None if file is None else _relative(file))


def _settings(of_kind: str, base: str, like: str) -> dict[str, Any]:
    from finetune.families.known import known_base
    from finetune.families.settings import Base
    from finetune.ui.settings_list import settings_rows

    return settings_rows(of_kind, known_base(Base(source=base, like=like or None)))


def _relative(path: Path) -> Path:
    """As a command would name it, from here; without a place of this machine if possible."""
    here = Path.cwd()
    return path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path
