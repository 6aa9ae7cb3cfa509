"""Who may ask `discl browse` what: checks every request before a route sees it.

The server listens on 127.0.0.1. Pages of other sites reach it through the user's browser (with
another Origin, or with a name of theirs that resolves to 127.0.0.1), and other users of the machine
reach its port. So a request needs the right Host and the cookie of the printed address. One that
changes something also needs the page's token, the right Origin, JSON, and a short body.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from secrets import compare_digest, token_urlsafe
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 2**20
"""Of the body of a request."""
SAFE = ("GET", "HEAD")
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True)
class Secrets:
    """What the server and its page know.

    - `key`: in the printed address, then in a cookie.
    - `token`: in the page, then in the header of requests that change something.
    """

    key: str = field(default_factory=lambda: token_urlsafe(24))
    token: str = field(default_factory=lambda: token_urlsafe(24))


class Guard:
    """ASGI middleware that refuses requests of others; adds the security headers to all answers.

    - `port`: of the server, which Host and Origin have to name.
    """

    def __init__(self, app: ASGIApp, port: int, secrets: Secrets) -> None:
        self.app, self.secrets = app, secrets
        self.port, self.cookie = port, f"discl-{port}"
        names = [f"{host}:{port}" for host in ("127.0.0.1", "localhost")]
        self.hosts = {*names, *(["127.0.0.1", "localhost"] if port == 80 else [])}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        refusal = self._refuse(scope, headers)
        if refusal is None and scope["method"] not in SAFE:
            body = await _read_body(receive)
            if body is None:
                refusal = _error(413, f"the request is longer than {MOST_BYTES} bytes.")
            else:
                receive = _replay(body)
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _refuse(self, scope: Scope, headers: Headers) -> Response | None:
        if headers.get("host", "").lower() not in self.hosts:
            return _error(
                421,
                f"open 127.0.0.1 at port {self.port}; a tunnel has to keep the number of the port.",
            )
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if scope["path"] == "/" and "key" in query and scope["method"] in SAFE:
            return self._enter(query["key"][0])
        if not _same(_cookies(headers).get(self.cookie, ""), self.secrets.key):
            return _error(403, "open the address that `discl browse` prints; its key is missing.")
        if scope["path"] != "/" and headers.get("sec-fetch-site", "none") not in (
            "same-origin",
            "none",
        ):
            return _error(403, "pages of other sites may not ask for this.")
        return None if scope["method"] in SAFE else self._refuse_change(headers)

    def _enter(self, key: str) -> Response:
        if not _same(key, self.secrets.key):
            return _error(403, "the key is that of another server; open the address printed last.")
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(self.cookie, self.secrets.key, httponly=True, samesite="strict", path="/")
        return answer

    def _refuse_change(self, headers: Headers) -> Response | None:
        if headers.get("origin", "").lower() not in {f"http://{host}" for host in self.hosts}:
            return _error(403, "only the page of this server may change something.")
        if not _same(headers.get("x-token", ""), self.secrets.token):
            return _error(403, "the token of the page is missing or old; load the page again.")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _error(415, "the content type has to be application/json.")
        return None


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)


def _same(given: str, known: str) -> bool:
    """Whether two texts are equal, in a time that does not depend on where they differ."""
    return compare_digest(given.encode(), known.encode())


def _cookies(headers: Headers) -> Mapping[str, str]:
    try:
        found = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return {}
    return {name: each.value for name, each in found.items()}


async def _read_body(receive: Receive) -> bytes | None:
    """The body of a request; None if it is too long, or if the client leaves."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MOST_BYTES:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
