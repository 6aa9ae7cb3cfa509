"""`discl browse` as a command: ports, messages, and a real socket."""

from __future__ import annotations

import json
import socket
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from discl import cli
from discl.browse import server
from discl.errors import RunError
from helpers.browsed import make_browsed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_browsed(tmp_path_factory.mktemp("served"), sources=3)


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"port {port}.*--port"):
            server.bind(port)


def test_the_default_port_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with server.bind(None) as first, server.bind(None) as second:
        ports = [each.getsockname() for each in (first, second)]
    assert ports[0][1] < ports[1][1] and {host for host, _ in ports} == {"127.0.0.1"}
    monkeypatch.setattr(server, "TRIED", 0)
    with pytest.raises(RunError, match="--port"):
        server.bind(None)


def test_without_the_packages_the_command_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("uvicorn", "starlette"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            with pytest.raises(RunError, match=r"discl\[browse\]"):
                server.serve(run, lambda value: None)


def test_the_command_refuses_what_is_no_run_folder(tmp_path: Path) -> None:
    for words in ([str(tmp_path)], ["fashion-lt"], [str(tmp_path / "none")]):
        done = CliRunner().invoke(cli.app, ["browse", *words, "--no-open"])
        assert isinstance(done.exception, RunError) and "run folder" in str(done.exception)


def test_a_recipe_in_the_place_of_a_folder_gets_a_hint(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.parent / "runs").mkdir()
    (run.parent / "runs" / "birds").symlink_to(run)
    monkeypatch.chdir(run.parent)
    for name in ("birds", "birds.yaml"):
        with pytest.raises(RunError, match="runs/birds"):
            server.serve(Path(name), lambda changes: None)


def test_a_browser_of_this_machine_is_served(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real socket; uvicorn takes signals in the main thread only."""
    import uvicorn

    started: dict[str, Any] = {}
    real = uvicorn.Server.run

    def remembered(self: uvicorn.Server, sockets: Any = None) -> None:
        started["server"] = self
        real(self, sockets)

    monkeypatch.setattr(uvicorn.Server, "run", remembered)
    ready = threading.Event()

    def on_start(address: str) -> None:
        started["address"] = address
        ready.set()

    words = {"port": None, "show": False, "on_start": on_start}
    thread = threading.Thread(target=server.serve, args=(run, lambda value: None), kwargs=words)
    thread.start()
    try:
        assert ready.wait(20)
        address, _, key = started["address"].partition("/?key=")
        cookie = f"discl-{address.rpartition(':')[2]}={key}"
        asked = urllib.request.Request(f"{address}/api/run", headers={"Cookie": cookie})
        with urllib.request.urlopen(asked, timeout=20) as answer:
            assert json.load(answer)["name"] == "browsed"
    finally:
        started["server"].should_exit = True
        thread.join(20)
    assert not thread.is_alive()
