"""Texts of a recipe remain text: they open no file, receive no secret and are not evaluated."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

import discl
from discl.errors import EndpointError, StoreError
from discl.export.signatures import suffix_of
from discl.prompts import class_prompts
from discl.prompts.endpoint import read_key
from discl.spectrum.filesystems import open_filesystem
from discl.spectrum.store import spectrum_shards

SOURCE = Path(discl.__file__).parent


@pytest.mark.parametrize(
    "url",
    [
        "reference://x::file://{refs}",
        "simplecache::file://{refs}",
        "filecache::memory://a",
        "zip://a::file://{refs}",
        "file://a::file://{refs}",
        "reference://{refs}",
        "zip://{refs}",
        "blockcache://a",
        "memory://a::memory://b",
    ],
)
def test_a_store_is_one_place_and_no_file_that_leads_elsewhere(url: str, tmp_path: Path) -> None:
    """With a file of references any file of this machine could become a shard."""
    refs = tmp_path / "refs.json"
    content: dict[str, Any] = {"version": 1, "refs": {"part-0.parquet": [str(tmp_path / "secret")]}}
    refs.write_text(json.dumps(content))
    address = url.format(refs=refs)
    with pytest.raises(StoreError, match=re.escape(address)):
        open_filesystem(address)
    with pytest.raises(StoreError, match=re.escape(address)):
        spectrum_shards(address, ["a"])


def test_only_what_is_called_like_a_key_is_sent_to_a_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recipe names the variable and the server."""
    names = (
        "HOME",
        "PATH",
        "DATABASE_URL",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "DB_PASSWORD",
        "ssh_key",
        "SSH_PRIVATE_KEY",
        "MY_SECRET_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
    )
    for name in names:
        monkeypatch.setenv(name, "hidden-value")
        with pytest.raises(EndpointError, match=name) as raised:
            read_key(name)
        assert "hidden-value" not in str(raised.value)
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "my_key"):
        monkeypatch.setenv(name, "hidden-value")
        assert read_key(name) == "hidden-value"


@pytest.mark.parametrize(
    "template",
    [
        "{class.__init__.__globals__} {class}",
        "{{ 7*7 }} {class}",
        "{class!r} %s ${HOME} {class}",
        "{0} {class}",
    ],
)
def test_templates_are_filled_and_not_carried_out(template: str) -> None:
    for name in ("boot", "{class}", "{0.__class__}", "{{ 7*7 }}", "%s"):
        texts = class_prompts([name], [template])
        assert texts == {name: [template.replace("{class}", name)]}


def test_every_format_string_is_one_of_ours() -> None:
    """`format` on a text of a recipe could read attributes of its arguments."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            text = node.func.value
            if node.func.attr in {"format", "format_map"} and ast.unparse(text) != "self":
                constant = ast.unparse(text).rpartition(".")[2].isupper()
                ours = isinstance(text, ast.Constant) or constant
                found.append((path.name, node.lineno, ours))
            assert node.func.attr not in {"from_string", "safe_substitute"}, (path, node.lineno)
    assert found and all(ours for _, _, ours in found), found


def test_pages_escape_everything_and_mark_nothing_as_safe() -> None:
    templates = sorted((SOURCE / "report").glob("*.j2"))
    assert len(templates) > 4
    for path in templates:
        text = path.read_text()
        assert not re.search(r"\|\s*safe\b|autoescape|Markup|<script|\son\w+=", text), path.name
        assert not re.search(r"=\s*\{\{", text), f"{path.name}: a value without quotes"
    assert "autoescape=True" in (SOURCE / "report" / "templates.py").read_text()


def test_only_plugins_and_our_own_names_are_imported_by_name() -> None:
    """Only for plugins, which need permission, and for the lazy names of the package."""
    callers = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if re.search(r"import_module\(|__import__\(|runpy|exec_module\(", path.read_text())
    }
    assert callers <= {"utils/plugins.py", "__init__.py", "data/__init__.py"}, callers


def test_a_picture_of_a_shared_store_that_no_export_takes_is_told() -> None:
    with pytest.raises(StoreError, match="GIF89a"):
        suffix_of(b"GIF89a\x01\x00")
    assert [suffix_of(data) for data in (b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF")] == [
        "png",
        "jpg",
        "webp",
    ]
