"""CIFAR as the hub has it: other words for the columns, names with underscores."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from discl.assets import PHRASES
from discl.data import read_tables
from discl.prompts import class_prompts
from discl.recipe import load_recipe

NAMES = sorted(yaml.safe_load((PHRASES / "cifar100.yaml").read_text()))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`uoft-cs/cifar100`: `cifar100/{train,test}-00000-of-00001.parquet`, with img, fine_label."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = Features(
        {
            "img": ImageFeature(),
            "fine_label": ClassLabel(names=[name.replace(" ", "_") for name in NAMES]),
            "coarse_label": ClassLabel(names=["aquatic_mammals", "fish"]),
        }
    )
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(stream, "PNG")
    for split, rows in (("train", 200), ("test", 100)):
        columns = {
            "img": [{"bytes": stream.getvalue(), "path": None}] * rows,
            "fine_label": [row % 100 for row in range(rows)],
            "coarse_label": [row % 2 for row in range(rows)],
        }
        (tmp_path / "data" / "cifar100").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features).to_parquet(
            tmp_path / "data" / "cifar100" / f"{split}-00000-of-00001.parquet"
        )
    return tmp_path / "data"


@pytest.mark.parametrize(
    "columns", [{}, {"image": "img", "label": "fine_label"}], ids=["as it is", "columns named"]
)
@pytest.mark.parametrize("below", ["", "cifar100"])
def test_cifar100(columns: dict[str, str], below: str, root: Path) -> None:
    tables = read_tables(str(root / below), columns=columns)
    assert {split: len(table) for split, table in tables.items()} == {"train": 200, "test": 100}
    table = tables["train"]
    assert (table.class_names, table.labels[:102].tolist()) == (tuple(NAMES), [*range(100), 0, 1])
    assert table.image(3).getpixel((0, 0)) == (1, 2, 3)
    assert len(class_prompts(table.class_names, ["a photo of {class}"], "embedded:cifar100")) == 100


def test_the_coarse_labels_may_be_asked_for(root: Path) -> None:
    assert read_tables(str(root), columns={"label": "coarse_label"})["train"].class_names == (
        "aquatic mammals",
        "fish",
    )


def test_the_shipped_root_is_a_folder_and_no_name_on_the_hub(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_recipe("cifar100-lt-ir100-ce-discl").data
    monkeypatch.chdir(root.parent)
    assert len(read_tables(data.root, data.format)["train"]) == 200
    monkeypatch.chdir(root)
    with pytest.raises(Exception, match=r"^root: './data/cifar100' does not exist; looked for"):
        read_tables(data.root, data.format)
