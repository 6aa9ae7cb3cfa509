"""The commands of docs/your-own-data.md run in their order.

Only the checkpoints, the sizes and the threshold are replaced.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from discl import cli

PAGE = Path(__file__).parents[1] / "docs" / "your-own-data.md"
COUNTS = {"robin": 40, "sparrow": 30, "kingfisher": 12}


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the page, new images, and a list of the old ones with cameras and sequences."""
    random, listed = np.random.default_rng(0), ["path,label,camera,sequence"]
    for label, (name, count) in enumerate(COUNTS.items()):
        (tmp_path / "birds" / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 60, (32, 32, 3)).astype(np.uint8) + np.uint8(70 * label)
            Image.fromarray(pixels).save(tmp_path / "birds" / name / f"{number:03d}.png")
            listed.append(
                f"birds/{name}/{number:03d}.png,{name},camera {number % 3},{name}-{number // 2}"
            )
    (tmp_path / "cameras.csv").write_text("\n".join(listed) + "\n")
    [cameras] = [block for block in blocks("yaml") if block.startswith("extends: birds.yaml")]
    (tmp_path / "cameras.yaml").write_text(cameras)
    shutil.copytree(tmp_path / "birds" / "kingfisher", tmp_path / "new-birds")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_small(recipe: Path, diffusion: Path, clip: Path) -> None:
    """Small models and sizes in the recipe of `discl init`."""
    tree = yaml.safe_load(recipe.read_text())
    tree["spectrum"] |= {
        "checkpoint": str(diffusion),
        "num_inference_steps": 10,
        "dtype": "float32",
        "seeds": 1,
        "levels": [0, 50],
    }
    tree["filter"] |= {"checkpoint": str(clip), "threshold": -1}
    tree["train"] |= {
        "epochs": 4,
        "curriculum_epochs": 3,
        "batch_size": 32,
        "steps_per_epoch": 2,
        "image_size": 32,
        "resize": None,
    }
    tree["train"]["model"] |= {"stem": "3x3", "width": 4}
    tree["runtime"] = {"slots": 16}
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False))


def commands(tool: click.Command, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], set[str]]:
    """`{command: options}` of the command line."""
    found = {words: {option for each in tool.params for option in each.opts}}
    for name, below in getattr(tool, "commands", {}).items():
        found |= commands(below, (*words, name))
    return found


def test_commands_and_options_in_the_text_exist() -> None:
    """Whole commands belong in blocks, which are run."""
    known = commands(typer.main.get_command(cli.app))
    text = re.sub(r"```.*?```", "", PAGE.read_text(), flags=re.DOTALL)
    words_of = [each.split() for each in re.findall(r"`([^`]+)`", text)]
    named = {tuple(words[1:]) for words in words_of if words[0] == "discl"}
    assert named <= set(known), "not a command; put whole commands into blocks"
    assert {words[0] for words in words_of if words[0].startswith("--")} <= set().union(
        *known.values()
    )


@pytest.mark.slow
def test_each_command_of_the_page(
    birds: Path,
    tiny_diffusion: Path,
    tiny_clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outputs: dict[str, str] = {}
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    for line in lines:
        words = [word.replace("threshold=0.22", "threshold=-0.9") for word in shlex.split(line)]
        monkeypatch.setattr(sys, "argv", words)
        try:
            cli.main()
        except SystemExit as ended:
            assert not ended.code, f"{line}: {capsys.readouterr().err}"
        outputs[line] = capsys.readouterr().out
        if words[1] == "init":
            make_small(birds / "birds.yaml", tiny_diffusion, tiny_clip)
    assert "images to generate" in outputs["discl plan birds.yaml"]
    assert (birds / "runs/birds/report.html").stat().st_size > 10_000
    assert (
        yaml.safe_load((birds / "runs/birds/recipe.yaml").read_text())["filter"]["threshold"]
        == -0.9
    )
    assert (birds / "runs/birds/comparison.html").stat().st_size > 10_000
    assert list((birds / "birds-shards").glob("*.tar")) and list(
        (birds / "birds-hub").rglob("*.parquet")
    )
    assert len((birds / "predictions.csv").read_text().splitlines()) == 1 + COUNTS["kingfisher"]
    cameras = yaml.safe_load((birds / "runs/cameras/recipe.yaml").read_text())
    assert cameras["spectrum"]["levels"] == [50, 70, 90]
    assert cameras["spectrum"]["checkpoint"] == str(tiny_diffusion)
    assert "extends" not in cameras
