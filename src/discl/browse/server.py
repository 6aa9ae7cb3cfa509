"""Starts `discl browse`: a socket on 127.0.0.1, the address with its key, and the browser."""

from __future__ import annotations

import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..utils.logging import get_logger
from .run_view import RunView

logger = get_logger(__name__)

HOST = "127.0.0.1"
PORT = 8421
"""Default; the next free one is taken if it is not free."""
TRIED = 20


def serve(
    folder: Path,
    amend: Callable[[Mapping[str, Any]], None],
    *,
    port: int | None = None,
    show: bool = True,
    on_start: Callable[[str], None] = lambda address: None,
) -> None:
    """Serves a run folder until Ctrl-C.

    - `folder`: the run folder.
    - `amend`: as of `RunView`.
    - `port`: of 127.0.0.1; default 8421, or the next free one.
    - `show`: whether to open the browser.
    - `on_start`: called with the address.

    Raises RunError without the packages of `discl[browse]`, for a folder that is no run folder,
    and for a port that is taken.
    """
    try:
        import starlette  # noqa: F401 (before the modules that use it)
        import uvicorn
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("uvicorn", "starlette"):
            raise
        raise RunError(
            f"`discl browse` needs the package {package}: pip install 'discl[browse]'."
        ) from error
    from .app import make_app
    from .guard import Secrets

    view = RunView(folder, amend)
    listener = bind(port)
    threading.Thread(target=_read_ahead, args=(view,), daemon=True).start()
    secrets, chosen = Secrets(), listener.getsockname()[1]
    config = uvicorn.Config(
        make_app(view, chosen, secrets),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=2,
    )
    address = f"http://{HOST}:{chosen}/?key={secrets.key}"
    on_start(address)
    if show and _has_browser():
        threading.Timer(0.3, webbrowser.open, (address,)).start()
    with suppress(KeyboardInterrupt), listener:
        uvicorn.Server(config).run(sockets=[listener])


def _read_ahead(view: RunView) -> None:
    """Reads the rows and opens the data while the browser starts.

    An error shows with the request that meets it.
    """
    with suppress(Exception):
        view.columns()
        view.real()


def bind(port: int | None) -> socket.socket:
    """A socket of 127.0.0.1. Raises RunError for a port that is taken or not allowed."""
    ports = range(PORT, PORT + TRIED) if port is None else [port]
    for number in ports:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, number))
            listener.listen(128)
        except OSError as error:
            listener.close()
            reason = error.strerror or str(error)
            continue
        if port is None and number != PORT:
            logger.info(f"browse: port {PORT} is taken, so it is {number}")
        return listener
    if port is None:
        raise RunError(f"the ports {PORT} to {PORT + TRIED - 1} are taken; name one with --port.")
    raise RunError(f"port {port} cannot be used: {reason}. Name another one, or leave out --port.")


def _has_browser() -> bool:
    """Whether there is a screen to open a browser on."""
    if sys.platform != "linux":
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
