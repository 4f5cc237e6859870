"""Opens the page: finds a free port, says the address, and serves until it is ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finetune.core.errors import BadInput

PORT = 7870
TRIED = 20  # ports after the first
LOCAL = "127.0.0.1"
NEEDED = "the page needs more packages: install them with `pip install 'finetune-diffusion[ui]'`"
SHORTEST_PASSWORD = 8


@dataclass(frozen=True)
class Opening:
    """What the command was asked for. `host` other than this machine's needs a `password`. `port` None: a free one."""

    own: Path
    runs: Path
    bases: Path
    host: str = LOCAL
    port: int | None = None
    password: str = ""


def serve(wish: Opening, say: Callable[[str], None]) -> None:
    """Serves the page until SIGINT or SIGTERM. Runs that it started live on.

    Raises:
        BadInput: the packages are missing, the port is taken, or other machines could see the page without a password.
    """
    check_exposure(wish)
    try:
        import uvicorn

        from finetune.ui.pages import Pages, Rooms
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("starlette", "uvicorn", "anyio", "h11"):
            raise
        raise BadInput(NEEDED) from error
    from finetune.ui.guard import Rules, local_hosts

    wish.own.mkdir(parents=True, exist_ok=True)
    listening = bound(wish.host, wish.port)
    port = listening.getsockname()[1]
    pages = Pages(Rooms(wish.own, wish.runs, wish.bases), Rules(local_hosts(port), wish.password))
    shown = "127.0.0.1" if wish.host in (LOCAL, "0.0.0.0", "::") else wish.host
    say(f"open http://{shown}:{port}/ in a browser; Ctrl-C ends the page, and runs go on without it")
    config = uvicorn.Config(
        pages.app(), log_level="error", server_header=False, date_header=False, timeout_graceful_shutdown=3
    )
    with suppress(KeyboardInterrupt):  # Ctrl-C is how it ends
        uvicorn.Server(config).run(sockets=[listening])


def check_exposure(wish: Opening) -> None:
    """
    Raises:
        BadInput: other machines could open the page, and no good password is set.
    """
    if wish.password and len(wish.password) < SHORTEST_PASSWORD:
        raise BadInput(f"the password has {len(wish.password)} characters: take at least {SHORTEST_PASSWORD}")
    if wish.host not in (LOCAL, "localhost", "::1") and not wish.password:
        raise BadInput(
            f"--host {wish.host} shows the page to other machines: set a password for it with FINETUNE_UI_PASSWORD"
        )


def bound(host: str, port: int | None) -> socket.socket:
    """A socket on the port, or on the first free one from PORT on.

    Raises:
        BadInput: it is taken, or there is no such host.
    """
    for number in [port] if port is not None else range(PORT, PORT + TRIED):
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        found = socket.socket(kind, socket.SOCK_STREAM)
        try:
            if os.name == "posix":  # on Windows it would let two servers share a port
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((host, number))
            found.listen(128)
            return found
        except OSError as error:
            found.close()
            reason = error.strerror
    where = f"port {port} of {host}" if port is not None else f"every port from {PORT} to {PORT + TRIED - 1}"
    raise BadInput(f"{where} can't be used ({reason}): choose another with --port")
