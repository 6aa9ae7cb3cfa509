"""`overrides.csv`: read back exactly, safe in a spreadsheet, and shared by processes."""

from __future__ import annotations

import csv
import threading
from pathlib import Path

import pytest

from discl.errors import BrokenFileError, DataError
from discl.escaping import FORMULA
from discl.run_folder import paths
from discl.run_folder.overrides import Override, change_overrides, read_overrides

TEXTS = ("", "=1", "'=1", "''=1", "'tis", "-", "a,b", 'say "no"', "two\nlines", " x ", "＝é", "<b>")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert read_overrides(tmp_path) == {}
    changes = {
        f"id{number}": Override(("keep", "drop", "none")[number % 3], text or "t", text)
        for number, text in enumerate(TEXTS)
    }
    change_overrides(tmp_path, changes.items())
    assert read_overrides(tmp_path) == changes
    with (tmp_path / paths.OVERRIDES).open(newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert len(cells) == 4 * (1 + len(TEXTS)) and not any(map(_is_formula, cells))
    change_overrides(tmp_path, [("id0", Override("none", "", "only a note"))])
    assert list(read_overrides(tmp_path)) == list(changes)[1:]


def _is_formula(cell: str) -> bool:
    return cell.startswith(FORMULA)


def test_a_person_may_edit_it(tmp_path: Path) -> None:
    path = tmp_path / paths.OVERRIDES
    path.write_text("\ufefftag,id,verdict,other\r\nodd,a,Keep,x\r\n,b,,\r\n,a,drop,\r\n")
    assert read_overrides(tmp_path) == {"b": Override(), "a": Override("drop")}
    path.write_text("id\na\n")
    assert read_overrides(tmp_path) == {"a": Override()}
    path.write_text("")
    assert read_overrides(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("name,verdict\na,keep\n", "'id'"),
        ("id;verdict\na;keep\n", "'id'"),
        ("id,verdict\na,keep\nb,maybe\n", "line 3"),
        ("id,verdict\n,keep\n", "line 2"),
        ("id,verdict\na,keep,1,2\n", "line 2"),
        ('id,verdict\n"a,keep\n', "CSV"),
        ("id,tag\na,\x1b[2J\n", "line 2"),
        (f"id,reason\na,{'x' * 501}\n", "line 2"),
        ("id,verdict\n\x1b[2J,keep\n", "line 2: id"),
        (f"id,verdict\n{'x' * 201},keep\n", "line 2: id"),
        ("id,verdict\na,\xff\n", paths.OVERRIDES),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / paths.OVERRIDES).write_bytes(text.encode("latin-1"))
    with pytest.raises(BrokenFileError, match=named):
        change_overrides(tmp_path, [("c", Override("keep"))])
    assert (tmp_path / paths.OVERRIDES).read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize("values", [{"verdict": "maybe"}, {"tag": "x" * 61}, {"reason": "\x00"}])
def test_a_wrong_override_names_its_argument(values: dict[str, str]) -> None:
    with pytest.raises(DataError) as raised:
        Override(**values)
    assert raised.value.argument == next(iter(values))


def test_changes_at_once_are_all_kept(tmp_path: Path) -> None:
    def change(number: int) -> None:
        for turn in range(3):
            change_overrides(tmp_path, [(f"{number}-{turn}", Override("drop"))])

    threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_overrides(tmp_path)) == 12


def test_a_file_larger_than_memory_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / paths.OVERRIDES).open("wb") as stream:
        stream.truncate(1 << 40)  # a hole: it takes no room
    with pytest.raises(BrokenFileError, match="larger than 512 MB"):
        read_overrides(tmp_path)
