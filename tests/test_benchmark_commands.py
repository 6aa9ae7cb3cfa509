"""Commands of benchmarks and tools in the documentation name files and options that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"python (-m )?((?:benchmarks|tools)[\w./]*\w)([^\n`#]*)")
SOURCES = [
    ROOT / "README.md",
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "benchmarks").rglob("*.md"),
    *(ROOT / "benchmarks").rglob("*.py"),
    *(ROOT / "benchmarks").rglob("*.yaml"),
    *(ROOT / "tools").glob("*.py"),
]


def commands() -> set[tuple[str, str, str]]:
    """(file that has it, script, option) of every command; `""` for one without options."""
    found = set()
    for file in SOURCES:
        text = re.sub(r"\\{1,2}\n\s*", " ", file.read_text())
        for is_module, name, arguments in COMMAND.findall(text):
            script = name.replace(".", "/") + ".py" if is_module else name
            for option in re.findall(r"--[\w-]+", arguments) or [""]:
                found.add((str(file.relative_to(ROOT)), script, option))
    return found


def test_every_command_names_a_script_and_options_that_exist() -> None:
    found = commands()
    assert len(found) >= 100
    wrong = [
        each
        for each in sorted(found)
        if not (ROOT / each[1]).is_file() or (each[2] and f'"{each[2]}"' not in _text(each[1]))
    ]
    assert not wrong


def _text(script: str) -> str:
    """The script and those of its folder that it imports, which may read its options."""
    file = ROOT / script
    text = file.read_text()
    names = re.findall(r"^(?:import|from) (?:benchmarks\.)?(\w+)", text, re.MULTILINE)
    beside = [file.with_name(f"{name}.py") for name in names]
    return "".join([text, *(each.read_text() for each in beside if each.is_file())])
