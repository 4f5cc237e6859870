"""The addresses for LoRA files of any trainer: what can be asked, and what is answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

from finetune.core.errors import BadInput
from finetune.ui.answers import sent_file, told_in_words, values_of
from finetune.ui.drafts import base_of, bases_in
from finetune.ui.helpers import Helpers
from finetune.ui.loras import Loras
from finetune.ui.uploads import Uploads


class LoraPages:
    """Answers the requests about LoRA files. `bases`: the folder of the bases to choose from. `helpers`: the chores,
    which begin with the server."""

    def __init__(self, uploads: Uploads, bases: Path, helpers: Callable[[], Helpers]) -> None:
        self.uploads, self.bases, self.helpers = uploads, bases, helpers
        self.loras = Loras(uploads)

    def routes(self) -> list[Route]:
        """The addresses."""
        return [
            Route("/api/loras", told_in_words(self.loras_here)),
            Route("/api/loras", told_in_words(self.add_lora), methods=["PUT"]),
            Route("/api/merge", told_in_words(self.merge), methods=["POST"]),
            Route("/api/loras/{id}/{what}", told_in_words(self.change_lora), methods=["POST"]),
            Route("/loras/{id}", told_in_words(self.send_lora)),
        ]

    async def loras_here(self, request: Request) -> Any:
        return {"files": await run_in_threadpool(self.loras.listed), "bases": sorted(bases_in(self.bases))}

    async def add_lora(self, request: Request) -> Any:
        return {"id": await self.loras.add(request.query_params.get("name", ""), request.stream())}

    async def change_lora(self, request: Request) -> Any:
        """verify, convert or remove a LoRA file."""
        chosen, what, values = request.path_params["id"], request.path_params["what"], await values_of(request)
        if what == "remove":
            await run_in_threadpool(self.loras.remove, chosen)
            return {"done": True}
        if what == "verify":
            given: dict[str, Any] = {"file": str(self.loras.path(chosen)), "base": self._named_base(values)}
            return {"chore": self.helpers().order("verify", given)}
        if what != "convert":
            raise BadInput("the server knows nothing of this: load the page again")
        return self._made("convert", self.loras.conversion(chosen, values), values)

    async def merge(self, request: Request) -> Any:
        values = await values_of(request)
        return self._made("merge", self.loras.merging(values), values)

    def _made(self, name: str, given: dict[str, Any], values: Mapping[str, Any]) -> Any:
        """Orders a chore that writes a new LoRA file."""
        chosen = self.loras.new()
        own = {"folder": str(self.loras.home / chosen), "base": self._named_base(values)}
        return {"chore": self.helpers().order(name, {**given, **own}), "id": chosen}

    def _named_base(self, values: Mapping[str, Any]) -> str | None:
        """The base that a page named; None: the file tells."""
        return base_of(values["base"], bases_in(self.bases)) if values.get("base") else None

    async def send_lora(self, request: Request) -> Any:
        return await sent_file(self.uploads, self.loras.path(request.path_params["id"]))
