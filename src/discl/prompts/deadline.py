"""Requests with a deadline as a whole and a bound on the size of the answer.

The timeouts of `http.client` hold for one read each, so a server that sends a byte now and then
could
keep a request for ever. Here the connection itself is ended.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
import urllib.request
from contextlib import suppress
from typing import Any


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Followed blindly, a redirect would carry the key to another host."""

    def http_error_302(self, *_: Any) -> None:
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302  # type: ignore[assignment]


class Deadline:
    """Ends the connections that are made through it, `seconds` after its block begins.

    What is read then breaks off, or fails as where a server hangs up, and `passed` is true.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.passed = False
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self._until = time.monotonic() + seconds
        self._timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._end)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            for each in self._connections:
                each.close()
            self._connections.clear()

    def _end(self) -> None:
        with self._lock:
            self.passed = True
            for each in self._connections:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def connect(self, address: tuple[str, int], *_: object) -> socket.socket:
        """As `socket.create_connection`, within what is left of the time."""
        failure: OSError = TimeoutError("timed out")
        for family, kind, protocol, _name, where in socket.getaddrinfo(
            *address, 0, socket.SOCK_STREAM
        ):
            left = self._until - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            made = socket.socket(family, kind, protocol)
            try:
                made.settimeout(left)
                made.connect(where)
                self._keep(made)
                return made
            except OSError as error:
                failure = error
                made.close()
        raise failure

    def _keep(self, made: socket.socket) -> None:
        """A second handle of the connection, which stays where TLS takes the first one over."""
        with self._lock:
            if self.passed:
                raise TimeoutError("timed out")
            self._connections.append(made.dup())


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self.deadline = deadline

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        def make(host: str, **given: Any) -> http.client.HTTPConnection:
            return _through(self.deadline, http.client.HTTPConnection(host, **given))

        return self.do_open(make, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self.deadline = deadline

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        def make(host: str, **given: Any) -> http.client.HTTPConnection:
            return _through(self.deadline, http.client.HTTPSConnection(host, **given))

        return self.do_open(make, req)


def _through(
    deadline: Deadline, connection: http.client.HTTPConnection
) -> http.client.HTTPConnection:
    connection._create_connection = deadline.connect  # type: ignore[attr-defined]
    return connection


def open_within(
    request: urllib.request.Request, deadline: Deadline, proxies: bool = True
) -> http.client.HTTPResponse:
    """The answer to a request, in the block of a deadline; raises as `urllib.request.urlopen` does.

    Without `proxies` those that the environment names are passed over.
    """
    handlers: list[Any] = [NoRedirect, _Http(deadline), _Https(deadline)]
    if not proxies:
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers).open(request, timeout=deadline.seconds)
