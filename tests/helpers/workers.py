"""Worker processes that misbehave. Each is the `target` of a `LocalWorkerPool`; none loads torch,
so it starts at once."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any


def die(connection: Connection, environment: Mapping[str, str]) -> None:
    os._exit(1)


def tell_what_is_loaded(connection: Connection, environment: Mapping[str, str]) -> None:
    """Ends with the status STATUS of its environment, and one more if diffusers is loaded."""
    os._exit(int(environment["STATUS"]) + ("diffusers" in sys.modules))


def send_nonsense(connection: Connection, environment: Mapping[str, str]) -> None:
    connection.send(("nonsense",))
    connection.recv()


def send_half(connection: Connection, environment: Mapping[str, str]) -> None:
    """Is killed in the middle of a message of 100 bytes."""
    os.write(connection.fileno(), struct.pack("!i", 100) + b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def denoise_only(connection: Connection, environment: Mapping[str, str]) -> None:
    """Is killed after it has denoised an image and before it writes one."""
    for question in (("take", True), ("advance",)):
        connection.send(question)
        connection.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def fall_silent(connection: Connection, environment: Mapping[str, str]) -> None:
    """Writes a shard and then asks nothing for long, as with a large model."""
    from discl.stages.workers import local

    make_pieces, made = local.make_pieces, []

    def slow(run: Any, ahead: int, take: Callable[..., Any], advance: Callable[[], bool]) -> Any:
        def wait() -> bool:
            made.append(1)
            if len(made) > 6:
                time.sleep(600)
            return advance()

        return make_pieces(run, ahead, take, wait)

    local.make_pieces = slow
    local.run_worker(connection, environment)
