"""Stands before every request: the right host and origin, the page's own token, and a password if one is set."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import secrets
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN = "x-finetune-token"
SAFE = ("GET", "HEAD")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
}
WRONG_PASSWORD_WAIT = 1.0  # seconds


@dataclass(frozen=True)
class Rules:
    """`hosts`: what the Host header may say, besides any host if there is a `password`. `token`: what a page must
    send with everything that changes something."""

    hosts: frozenset[str]
    password: str = ""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))


def local_hosts(port: int) -> frozenset[str]:
    """The names of this machine, as a browser on it says them."""
    return frozenset(f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]"))


class Guard:
    """An ASGI middleware that refuses what `Rules` do not allow, and adds the headers that keep a page to itself."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no websockets here
            return
        headers = Headers(scope=scope)
        code, sentence = self._refusal(scope["method"], headers)
        if code == 401:
            await asyncio.sleep(WRONG_PASSWORD_WAIT if "authorization" in headers else 0)
        if code:
            await _say(send, code, sentence)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    added[name] = value
                added.setdefault("content-security-policy", POLICY)
                added.setdefault("cache-control", "no-store")
            await send(message)

        await self.app(scope, receive, guarded)

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str]:
        """(0, "") or the code and the sentence of a refusal."""
        host = headers.get("host", "")
        if not self.rules.password and host not in self.rules.hosts:
            return 421, "this page is for a browser on this machine: open the address that the command printed"
        if self.rules.password and not self._knows_password(headers.get("authorization", "")):
            return 401, "give the password that the command was started with"
        if _from_another_site(method, headers):
            return 403, "this came from another web page: open the page itself"
        if method not in SAFE and not hmac.compare_digest(headers.get(TOKEN, "").encode(), self.rules.token.encode()):
            return 403, "the page is older than the server: load it again"
        return 0, ""

    def _knows_password(self, header: str) -> bool:
        kind, _, given = header.partition(" ")
        try:
            _, _, password = base64.b64decode(given, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return False
        return kind.lower() == "basic" and hmac.compare_digest(password.encode(), self.rules.password.encode())


def _from_another_site(method: str, headers: Headers) -> bool:
    """A link on another page may open this one; nothing else may be asked from there."""
    site, origin = headers.get("sec-fetch-site", "none"), headers.get("origin")
    opened = method in SAFE and headers.get("sec-fetch-mode") == "navigate"
    if site not in ("none", "same-origin") and not opened:
        return True
    return origin is not None and origin.partition("://")[2] != headers.get("host", "")


async def _say(send: Send, code: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b'Basic realm="finetune", charset="UTF-8"')] * (code == 401)
    headers += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
