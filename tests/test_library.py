"""The blocks of docs/library.md run in their order, with the models that ship."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

from discl.data import read_tables

PAGE = Path(__file__).parents[1] / "docs" / "library.md"
COUNTS = {"Trouser": 20, "Bag": 6}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the page."""
    shipped = read_tables("embedded:fashion-mnist/data")["train"]
    for name, count in COUNTS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        rows = [
            row
            for row, label in enumerate(shipped.labels)
            if label == shipped.class_names.index(name)
        ]
        for number, row in enumerate(rows[:count]):
            shipped.image(row).save(tmp_path / "photos" / name / f"{number:03d}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_each_block_of_the_page(photos: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    Path("page.py").write_text("\n".join(blocks))
    names = runpy.run_path("page.py")
    for level in (0, 30, 60, 90):
        assert Image.open(f"bag-{level:02d}.png").size == (32, 32)
    assert {request.id for request in names["plan"]} == names["store"].ids() and names[
        "table"
    ].num_rows == 6 * 2 * 2
    assert len(names["spectrum"]) == 24 and names["one"]["level"] == 0
    assert set(names["cosines"]) == names["store"].ids() and names["keep"]
    assert [names["strategy"].levels(epoch, ()) for epoch in (0, 2, 4)] == [
        (0,),
        (50,),
        (),
    ]
    curriculum, resumed = names["curriculum"], names["resumed"]
    assert (
        len(curriculum.history) == 2
        and resumed.history[:2] == curriculum.history
        and resumed.epoch == 6
    )
    assert [len(share) for share in names["shares"]] == [13, 13]
