"""A chat server on 127.0.0.1, scripted by a test."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from discl.prompts.chat_client import Pause


@dataclass
class Raw:
    """The raw bytes of an answer, with the status line.

    - `reset`: reset the connection after the answer.
    - `again`: sent after the answer until the client disconnects, every `pause` seconds.
    """

    data: bytes
    reset: bool = False
    again: bytes = b""
    pause: float = 0.0


Reply = tuple[int, dict[str, str], str | bytes] | Raw


def sentences(name: str, count: int, start: int = 0) -> list[str]:
    """Valid descriptions: twenty words each that name the class."""
    return [
        f"Photograph {start + each} of the {name} in soft light"
        + " beside an old wall of grey stone and dry grass"
        for each in range(count)
    ]


def completion(content: str | None) -> Reply:
    return (
        200,
        {},
        json.dumps(
            {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
        ),
    )


def numbered(texts: list[str]) -> Reply:
    return completion("\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1)))


def asked_for(body: dict) -> tuple[str, int]:
    """Class and number of texts of the last message of a request."""
    count, name = re.search(
        r'Write (\d+) descriptions of photographs of "([^"]+)"', body["messages"][-1]["content"]
    ).groups()
    return name, int(count)


@dataclass
class Server:
    url: str
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return [asked_for(body)[0] for body in self.bodies]


class Clock:
    """A clock that advances only while an endpoint waits; `waits` lists the seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return False

    @property
    def settings(self) -> dict[str, object]:
        """For an Endpoint that goes by this clock."""
        return {"stopped": self, "pause": Pause(self)}


@contextmanager
def serve(answer: Callable[[int, dict], Reply]) -> Iterator[Server]:
    """Serves `answer(number of previous requests, body)` while the context is open."""
    lock, closing = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                before = len(server.bodies)
                server.bodies.append(body)
                server.headers.append(dict(self.headers))
                server.paths.append(self.path)
            reply = answer(before, body)
            if isinstance(reply, Raw):
                self._send_raw(reply)
                return
            status, headers, said = reply
            data = said if isinstance(said, bytes) else said.encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def _send_raw(self, reply: Raw) -> None:
            with suppress(OSError):
                self.wfile.write(reply.data)
                while reply.again and not closing.wait(reply.pause):
                    self.wfile.write(reply.again)
            if reply.reset:
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.rfile.close()
                self.connection.close()

        def log_message(self, *_: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{listener.server_port}/v1")
    thread = threading.Thread(
        target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        closing.set()
        listener.shutdown()
        listener.server_close()
        thread.join()
