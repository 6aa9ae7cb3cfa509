"""Hostile names through everything that is written or printed: they stay text."""

from __future__ import annotations

import csv
import io
import json
import logging
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import disable_progress_bars
from markdown_it import MarkdownIt
from PIL import Image
from transformers.utils import logging as transformers_logging

from discl import cli
from discl.escaping import (
    FORMULA,
    HIDDEN,
    for_csv,
    for_latex,
    for_markdown,
    for_terminal,
    message,
    one_line,
)
from discl.evaluation.comparison import Entry, Interval, as_csv, as_latex, as_markdown
from discl.export import make_card
from discl.models.classifier import load_classifier
from discl.recipe import load_recipe
from discl.stages.compare import write_tables
from discl.stages.init import write_starter
from discl.utils.console import progress

PIECES = (
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "\r",
    "\n",
    "\t",
    "\x00",
    "\x7f",
    "\u202e",
    "\u2066",
    "\u2028",
    "\udcff",
    "\ufeff",
    "=1+1",
    "+1",
    "-1",
    "@x",
    "<script>alert(1)</script>",
    "<img src=x onerror=a()>",
    "<!--",
    "&lt;",
    "&",
    '"><svg onload=a()>',
    "'",
    '"',
    "|",
    "\\",
    "`",
    "``",
    "*",
    "_",
    "[a](javascript:b)",
    "![a](//b)",
    "](",
    "$x$",
    "\\input{x}",
    "{",
    "}",
    "%",
    "#",
    "^",
    "~",
    "{{ 7*7 }}",
    "{% raw %}",
    "{class}",
    "[bold]",
    "[/]",
    ":smile:",
    "é",
    "猫",
    "x",
    " ",
    "error: no",
    "---",
    "\\|",
    "\\\\",
)


def hostile(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return list(PIECES) + [
        "".join(draw.choices(PIECES, k=draw.randint(1, 6))) for _ in range(count - len(PIECES))
    ]


NAMES = hostile(600)


def test_nothing_that_steers_a_terminal_is_left() -> None:
    for name in NAMES:
        assert not HIDDEN.search(for_terminal(name)) and not HIDDEN.search(message(name))
        assert for_terminal(for_terminal(name)) == for_terminal(name)
        assert all(line.startswith(" ") for line in message(name).split("\n")[1:])
        assert one_line(name).isprintable()
    assert for_terminal("a\tb\nc é猫") == "a\tb\nc é猫"
    assert for_terminal("\x1b[31m\u202e\udcff\U000e0041") == r"\x1b[31m\u202e\udcff\U000e0041"


def test_no_cell_of_text_is_a_formula() -> None:
    for name in NAMES:
        assert not for_csv(name).startswith(FORMULA) and for_csv(name).endswith(name)
    assert [for_csv(each) for each in ("cat", "-1", "=a", "a=b")] == ["cat", "'-1", "'=a", "a=b"]


def test_markdown_shows_the_name_itself() -> None:
    """For an HTML parser it is a table of one row with a cell of text only."""
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    for name in NAMES:
        text = for_markdown(name)
        tokens = reader.parse(f"| {text} | 1 |\n|---|---|\n| {text} | 2 |\n")
        cells = [token for token in tokens if token.type == "inline"]
        assert len(cells) == 4, name
        for cell in cells[::2]:
            assert {each.type for each in cell.children or []} <= {"text", "text_special"}, name
            shown = "".join(each.content for each in cell.children or [])
            assert shown.strip() == one_line(" ".join(name.split())), name


def test_latex_has_no_command_in_a_name() -> None:
    allowed = re.compile(r"\\[%_&#${}]|\\text\w+\{\}|\$\\(lambda|pm)\$|--|[^\\%&#${}^~]")
    for name in NAMES:
        assert allowed.sub("", for_latex(name)) == "", name


def entries(name: str) -> list[Entry]:
    return [
        Entry(
            name,
            {"all": [0.5, 0.6]},
            {"all": Interval(-0.5, -1.0, 0.1)},
            {name: 3.0},
            {"all": 50.0},
        )
    ]


def test_tables_of_a_comparison() -> None:
    for name in NAMES[:200]:
        if "\r" in name:
            continue  # no method's name
        shown = as_markdown(entries(name), ["all"]).splitlines()
        assert len(shown) == 3 and not re.search("<(?!br)", shown[2])
        text = as_csv(entries(name), ["all"], [0, 1])
        rows = list(csv.reader(io.StringIO(text, newline="")))[1:]
        assert [row[0] for row in rows] == [for_csv(name)] * 2 and [row[2] for row in rows] == [
            "0.500000",
            "0.600000",
        ]
        assert len(as_latex(entries(name), ["all"]).splitlines()) == 7
    assert "-0.5 [-1.0, +0.1]" in as_markdown(
        entries("a"), ["all"]
    )  # figures of ours stay as they are


def test_notes_and_cards(tmp_path: Path) -> None:
    for name in NAMES[:80]:
        if name.encode(errors="ignore").decode() != name:
            continue  # no text of a file that we write, as the surrogates of file names
        notes = [name, f"a: {name}"]
        shown = {"seeds": [0, 1], "split": "test", "baseline": "a", "notes": notes}
        write_tables(tmp_path, entries("a"), ["all"], **shown)
        told = (tmp_path / "comparison.md").read_text()
        card = make_card(
            name,
            "imagefolder",
            3,
            class_names=[name],
            levels={0: (1, 2)},
            facts={name: name, "classes": name},
        )
        reader = MarkdownIt("commonmark", {"html": True}).enable("table")
        for text in (told, card.split("---\n", 2)[2]):
            kinds = {
                each.type
                for token in reader.parse(text)
                for each in (token, *(token.children or []))
            }
            assert not kinds & {"html_block", "html_inline", "link_open", "image"}, name
        header = yaml.safe_load(card.split("---\n", 2)[1])
        assert header["pretty_name"] == f"{name}: synthetic images"


def test_what_is_said_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES[:120]:
        logging.getLogger("discl.test").info(f"decode {name}")
        with progress(f"train {name}", 1) as advance:
            advance(1)
    told = capsys.readouterr().err
    assert not HIDDEN.search(told) and ":smile:" in told and "[bold]" in told
    assert all(line.startswith(("decode ", "train ", "  ")) for line in told.splitlines())
    assert not hasattr(sys.stderr, "rich_proxied_file")


def test_an_error_cannot_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("\x1b[2Jx.yaml", "x\nerror: all is well.yaml", "\u202elmay.yaml"):
        monkeypatch.setattr(sys, "argv", ["discl", "plan", name])
        with pytest.raises(SystemExit):
            cli.main()
        told = capsys.readouterr().err
        assert not HIDDEN.search(re.sub("\x1b\\[(31|0)m", "", told))
        assert sum(line.startswith("error") for line in told.splitlines()) == 1


def test_a_starter_is_the_recipe_of_its_folder_whatever_that_is_called(tmp_path: Path) -> None:
    for number, name in enumerate(
        ("a\nmethods: {x: {system: 'os:system'}}\n#", "b: {c}", "d'\ne: 1", "\x1b[31m", "# f")
    ):
        folder = tmp_path / str(number) / name
        for label in ("one", "two"):
            (folder / label).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (4, 4), (index, 0, 0)).save(folder / label / f"{index}.png")
        recipe = load_recipe(write_starter(folder, tmp_path / f"{number}.yaml"))
        assert recipe.data.root == str(folder) and all(
            each.system is None for each in recipe.methods.values()
        )


CLASSES = (
    '=HYPERLINK("x")',
    "<canary onload=a()>&<!--",
    '"><canary>\x1b[31m\u202e',
    "@x|y[z](w)*`\\\n# error: no",
)


class Tags(HTMLParser):
    """Collects the tags of a page, and the names of their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.sources: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources |= {str(value)[:11] for name, value in attrs if name in {"src", "href"}}


def is_harmless(page: str) -> bool:
    found = Tags(page)
    return (
        not found.tags & {"canary", "script", "iframe", "object", "form", "base"}
        and not any(name.startswith("on") for name in found.attributes)
        and all(each.startswith(("data:image/", "#")) for each in found.sources)
        and "canary" in page
    )


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_diffusion: Path, tiny_clip: Path
) -> dict[str, Any]:
    """A recipe over classes and files whose names attack whatever shows them."""
    folder = tmp_path_factory.mktemp("hostile")
    for split, count in (("train", 6), ("validation", 2), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (folder / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                noise = np.random.default_rng([label, index, len(split)]).integers(
                    256, size=(16, 16, 3), dtype=np.uint8
                )
                Image.fromarray(noise).save(
                    folder / "data" / split / name / f"=\x1b[7m<canary>{index}.png"
                )
    (folder / "data" / "train" / CLASSES[2] / "\x1b[2Jbad\n.png").write_bytes(b"no image")
    tree = {
        "name": "hostile",
        "data": {"root": str(folder / "data"), "unreadable": "skip"},
        "hard": {"fewer_than": 100},
        "spectrum": {
            "checkpoint": str(tiny_diffusion),
            "levels": [0, 50],
            "seeds": 1,
            "num_inference_steps": 2,
        },
        "filter": {"checkpoint": str(tiny_clip), "threshold": -1},
        "pilot": {"images": 16, "thresholds": [-1], "candidates": {CLASSES[0]: {}}},
        "methods": {"ce": {}, "discl": {"strategy": "all-levels", "sampling": "square-root"}},
        "train": {
            "batch_size": 4,
            "epochs": 2,
            "curriculum_epochs": 1,
            "image_size": 16,
            "model": {"width": 4, "stem": "3x3"},
        },
        "compare": {"seeds": [0]},
        "runtime": {"device": "cpu", "threads": 1, "slots": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return {"folder": folder, "recipe": str(folder / "recipe.yaml"), "out": str(folder / "run")}


@pytest.mark.slow
def test_hostile_names_through_every_command(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disable_progress_bars()  # bars of other packages steer the terminal, as they should
    transformers_logging.disable_progress_bar()
    folder, recipe, out = run["folder"], run["recipe"], Path(run["out"])
    exported, predicted = folder / "exported", folder / "predicted.csv"
    for arguments in (
        ["data", "check", recipe],
        ["run", recipe, "--out", str(out)],
        ["audit", recipe, "--out", str(out)],
        ["levels", recipe, "--out", str(out), "--sources", "4", "--grid", "0,50"],
        ["pilot", recipe, "--out", str(out)],
        ["compare", recipe, "--out", str(out)],
        ["report", recipe, "--out", str(out)],
        ["export", recipe, "--run", str(out), "--out", str(exported), "--to", "imagefolder"],
        ["predict", str(out), str(folder / "data" / "test"), "--out", str(predicted)],
        [
            "hard",
            recipe,
            "--out",
            str(out),
            "--set",
            f"hard.exclude=[{json.dumps('no ' + CLASSES[2])}]",
        ],
    ):
        monkeypatch.setattr(sys, "argv", ["discl", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        told = capsys.readouterr()
        assert (status == 0) == (arguments[0] != "hard"), (arguments, told)
        shown = told.out + told.err.removeprefix("\x1b[31m").removesuffix("\x1b[0m\n")
        found = HIDDEN.search(shown)
        assert not found, (arguments, shown[max(found.start() - 200, 0) : found.end() + 100])
        assert not any(line.startswith(("# error", "error")) for line in told.out.splitlines())
    for page in ("report.html", "levels/levels.html", "pilot/pilot.html"):
        assert is_harmless((out / page).read_text()), page
    assert '<section id="audit">' in (out / "report.html").read_text()
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    tables = ("comparison.md", "levels/levels.md", "pilot/pilot.md")
    for text in (*(out / name for name in tables), exported / "README.md"):
        tokens = reader.parse(text.read_text())
        kinds = {each.type for token in tokens for each in (token, *(token.children or []))}
        assert not kinds & {"html_block", "html_inline", "link_open", "image"}, text
    model = load_classifier(out / "train" / "discl")[1]
    assert set(model.class_names) == set(CLASSES)
    with predicted.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    cells = [cell for row in (header, *rows) for cell in row]
    assert not any(cell.startswith(FORMULA) for cell in cells) and len(rows) == 8
    assert "'" + CLASSES[0] in header and all(float(cell) >= 0 for row in rows for cell in row[2:])
    for table in out.rglob("*.csv"):
        with table.open(newline="") as stream:
            for cell in (cell for row in csv.reader(stream) for cell in row):
                assert not cell.startswith(FORMULA) or re.fullmatch(r"-?[\d.]+", cell)
