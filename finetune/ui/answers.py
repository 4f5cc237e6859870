"""How the page's requests are read, and answered: JSON in and out, files, and what is refused in one sentence."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from finetune.core.errors import BadInput
from finetune.core.reading import parse_json
from finetune.ui.plain_words import without_places
from finetune.ui.uploads import Uploads

MOST_TOLD = 1_000_000  # bytes of JSON in a request
Answer = Callable[[Request], Awaitable[Response]]


async def sent_file(uploads: Uploads, file: Path) -> Response:
    """A file, or a folder as a zip."""
    if file.is_file():
        return attached(file, file.name)
    packed = await run_in_threadpool(uploads.packed, file)
    return attached(packed, f"{file.name}.zip", BackgroundTask(packed.unlink))


def attached(file: Path, name: str, after: BackgroundTask | None = None) -> Response:
    """A file that the browser keeps and does not show."""
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(name)}"}
    return FileResponse(file, media_type="application/octet-stream", headers=headers, background=after)


def told_in_words(answer: Callable[[Request], Awaitable[Any]]) -> Answer:
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


async def values_of(request: Request) -> dict[str, Any]:
    """The JSON object of a request."""
    body = await body_of(request, MOST_TOLD)
    return parse_json(body.decode("utf-8", "replace") or "{}", "the request", dict, "load the page again")


async def body_of(request: Request, limit: int) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise BadInput("this is more than a page sends: send a smaller file, or load the page again")
    return body


def whole_number(value: Any, default: int) -> int:
    return value if type(value) is int and 0 <= value < 10**9 else default
