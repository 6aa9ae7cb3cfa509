"""Messages: library users route and silence them, the CLI shows them, none stops a run."""

from __future__ import annotations

import ast
import io
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from discl import cli
from discl.utils.console import console, progress, show_messages, shows_bars
from discl.utils.logging import SafeLogger, get_logger, silence

PACKAGE = Path(cli.__file__).parent
SAY = "from discl.utils.logging import get_logger; get_logger('discl.here').warning('one\\x1b[2J')"
STEP = "from discl.utils.console import progress\nwith progress('step', 1) as add: add(1)"


def run(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], text=True, **options)


def test_importing_sets_up_a_null_handler_and_nothing_else() -> None:
    tell = (
        "import logging, discl; print(logging.getLogger('discl').handlers, logging.root.handlers)"
    )
    done = run(f"{tell}\n{SAY}\n{STEP}", capture_output=True)
    assert done.stdout.strip() == "[<NullHandler (NOTSET)>] []" and not done.stderr


def test_a_library_user_routes_and_filters(tmp_path: Path) -> None:
    path = tmp_path / "log"
    setup = (
        "import logging, discl\n"
        f"logging.basicConfig(filename={str(path)!r}, level='INFO', "
        "format='%(name)s|%(message)s')\n"
    )
    done = run(f"{setup}{SAY}\n{STEP}", capture_output=True, check=True)
    assert not done.stderr
    lines = path.read_text().splitlines()
    assert lines == ["discl.here|one\x1b[2J", "discl.utils.console|step: 1 done"]
    path.unlink()
    run(f"{setup}logging.getLogger('discl').setLevel('ERROR')\n{SAY}\n{STEP}", check=True)
    assert not path.read_text()


def test_every_module_logs_by_its_own_name() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if path.name != "logging.py" and "get_logger(" in text:
            assert re.search(r"^logger = get_logger\(__name__\)", text, re.M), path
        if path.parent.name != "assets" and "print(" in text:
            calls = [each.func for each in ast.walk(ast.parse(text)) if isinstance(each, ast.Call)]
            assert "print" not in {each.id for each in calls if isinstance(each, ast.Name)}, path
        if path.parent.name != "utils":
            assert "logging.getLogger(__name__)" not in text or path == PACKAGE / "__init__.py"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`call("recipes")`: the command with a message at each level before it; standard error."""
    from discl import assets

    def speak() -> list[str]:
        for level in ("debug", "info", "warning", "error"):
            getattr(get_logger("discl.here"), level)(f"{level}\nof {level}")
        with progress("step", 1) as advance:
            advance(1)
        return ["fashion-lt"]

    def call(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(assets, "shipped_recipes", speak)
        monkeypatch.setattr(sys, "argv", ["discl", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr()

    return call


def test_levels_of_the_command_line(call: Callable[..., tuple[str, str]]) -> None:
    out, told = call("recipes")
    assert told == "info\n  of info\nwarning\n  of warning\nerror\n  of error\nstep: 1 done\n"
    quiet_out, told = call("--quiet", "recipes")
    assert told == "error\n  of error\n" and quiet_out == out
    verbose_out, told = call("--verbose", "recipes")
    assert verbose_out == out and told.count("\n") == 9
    assert re.match(r"\d\d:\d\d:\d\d DEBUG discl\.here: debug\n  of debug\n", told)


def test_quiet_and_verbose_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["discl", "--quiet", "--verbose", "recipes"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "--verbose" in capsys.readouterr().err


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    silence()
    get_logger("discl.here").critical("one")
    with progress("step", 1) as advance:
        advance(1)
    assert capsys.readouterr().err == ""


def test_bars_follow_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_force_terminal", True)
    show_messages(logging.INFO)
    assert shows_bars()
    show_messages(logging.ERROR)
    assert not shows_bars()
    monkeypatch.setattr(logging.getLogger("discl"), "handlers", [])
    logging.getLogger("discl").setLevel(logging.INFO)
    assert not shows_bars()  # the handlers of a library user know nothing of them


class Failing(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise OSError(28, "No space left on device")


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stream", [None, Closed(), io.StringIO()], ids=["none", "closed", "open"])
def test_a_handler_that_raises_stops_nothing(
    stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logging.getLogger("discl"), "handlers", [failing])
    get_logger("discl.here").warning("one")
    with progress("step", 1) as advance:
        advance(1)
    if isinstance(stream, io.StringIO) and not isinstance(stream, Closed):
        assert "No space left on device" in stream.getvalue()


def test_loggers_that_were_set_up_before_are_made_safe() -> None:
    early = logging.getLogger("discl.early")
    assert get_logger("discl.early") is early and isinstance(early, SafeLogger)


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2</dev/null"])
def test_a_standard_error_that_takes_nothing_stops_no_command(stderr: str, tmp_path: Path) -> None:
    """Closed, full, read-only: the result is printed, the status is 0, and no file becomes it."""
    code = (
        "import os, sys; from discl import assets, cli\n"
        "known = assets.shipped_recipes()\n"
        "def speak():\n"
        f"    file = open({str(tmp_path / 'data')!r}, 'w')\n"
        "    try: os.write(2, b'as a library in C does')\n"
        "    except OSError: pass\n"
        f"    {SAY}\n"
        "    from discl.utils import console\n"
        "    with console.progress('a', 1) as add: add(1)\n"
        "    return known\n"
        "assets.shipped_recipes = speak\n"
        "sys.argv = ['discl', 'recipes']\n"
        "cli.main()"
    )
    (tmp_path / "code.py").write_text(code)
    done = subprocess.run(
        f"{sys.executable} {tmp_path / 'code.py'} {stderr}", shell=True, stdout=subprocess.PIPE
    )
    assert done.returncode == 0 and b"fashion-lt" in done.stdout
    assert (tmp_path / "data").read_bytes() == b""


@pytest.mark.parametrize("stream", [None, Closed()], ids=["none", "closed"])
def test_an_error_has_its_status_where_it_cannot_be_shown(
    stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["discl", "plan", "no-such-recipe"])
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
