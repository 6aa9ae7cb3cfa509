"""The commands of the README run; only checkpoints and sizes are replaced by small ones."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from discl import cli
from discl.recipe import shipped_recipes

ROOT = Path(__file__).parents[1]


def commands(heading: str) -> list[str]:
    """Commands of the first shell block below a heading of the README, without comments."""
    section = (ROOT / "README.md").read_text().split(f"## {heading}")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [line.split("#")[0].strip() for line in block.group(1).splitlines() if line.strip()]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`call(command, folder, *more)` -> standard output of a command that ends well."""

    def run(command: str, folder: Path, *more: str) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [*shlex.split(command), *more])
        assert sys.argv[0] == "discl"
        try:
            cli.main()
        except SystemExit as ended:
            assert not ended.code, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of images, one of them rare, and a folder of new ones."""
    random = np.random.default_rng(0)
    for name, count, shade in (("round things", 60, 200), ("rare", 15, 60)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 40, (36, 40, 3)).astype(np.uint8) + np.uint8(shade)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number:02d}.png")
    (tmp_path / "new-photos").mkdir()
    for file in (tmp_path / "photos" / "rare").iterdir():
        Image.open(file).rotate(180).save(tmp_path / "new-photos" / file.name)
    return tmp_path


@pytest.mark.slow
def test_your_own_images(
    call: Callable[..., str], photos: Path, tiny_diffusion: Path, tiny_clip: Path
) -> None:
    small = [
        f"spectrum.checkpoint={tiny_diffusion}",
        "spectrum.num_inference_steps=4",
        "spectrum.dtype=float32",
        "spectrum.seeds=2",
        "spectrum.levels=[0, 50]",
        f"filter.checkpoint={tiny_clip}",
        "filter.threshold=-1",
        "train.epochs=3",
        "train.curriculum_epochs=2",
        "train.steps_per_epoch=2",
        "train.image_size=32",
        "train.resize=40",
        "train.model.stem=3x3",
        "train.model.width=8",
        "runtime.slots=8",
    ]
    replaced = [word for value in small for word in ("--set", value)]
    init, pilot, plan, run, predict = commands("Your own images")
    assert call(init, photos).strip() == "photos.yaml"
    assert "## Recommendation" in call(pilot, photos, *replaced, "--set", "pilot.images=8")
    planned = call(plan, photos, *replaced)
    assert "UNet rows" in planned and "images to generate" in planned
    assert call(run, photos, *replaced).strip().endswith("runs/photos/report.html")
    assert (photos / "runs/photos/report.html").stat().st_size > 10_000
    call(predict, photos)
    lines = (photos / "predictions.csv").read_text().splitlines()
    assert lines[0] == "image,prediction,probability,rare,round things"
    assert len(lines) == 16


def test_in_your_own_loop(
    filtered_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The block is unchanged; the run is a tiny one."""
    section = (ROOT / "docs/curricula.md").read_text().split("## In your own training loop")[1]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "short").symlink_to(filtered_run)
    monkeypatch.chdir(tmp_path)
    Path("loop.py").write_text(block.group(1))
    names = runpy.run_path("loop.py")
    assert names["epoch"] == 11 and len(names["curriculum"].history) == 2
    assert [len(record["levels"]) for record in names["curriculum"].history] == [1, 1]


def test_a_spectrum_of_one_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The block is unchanged."""
    section = (ROOT / "README.md").read_text().split("## From Python")[1]
    block = next(
        block
        for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        if "Engine(" in block
    )
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 36), "grey").save("boot.png")
    Path("one.py").write_text(block)
    runpy.run_path("one.py")
    assert [Image.open(f"boot-{level:02d}.png").size for level in (0, 30, 60, 90)] == [(32, 32)] * 4


def test_the_make_targets_exist() -> None:
    targets = (ROOT / "Makefile").read_text()
    for command in commands("The first five minutes"):
        assert re.search(rf"^{command.removeprefix('make ')}:", targets, re.MULTILINE)


def test_stage_commands_exist(call: Callable[..., str]) -> None:
    listed = re.findall(
        r"^\| `discl (\w+)`", (ROOT / "docs/getting-started.md").read_text(), re.MULTILINE
    )
    assert listed == [
        "hard",
        "prompts",
        "retrieve",
        "plan",
        "generate",
        "filter",
        "train",
        "evaluate",
        "report",
    ]
    for stage in listed:
        assert f"discl {stage}" in call(f"discl {stage} --help", ROOT)


def test_links_have_targets() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("https://") or document.parent.joinpath(target).exists(), (
                f"{document}: {target}"
            )


def test_the_table_lists_the_shipped_recipes() -> None:
    section = (ROOT / "docs/paper.md").read_text()
    named = re.findall(
        r"`((?:imagenet-lt|cifar100-lt|cifar10-lowlight|inaturalist2018|iwildcam|fashion-lt)[a-z0-9-]*)`",
        section,
    )
    assert "fashion-lt" in named
    for name in named:
        assert name in shipped_recipes()
    families = {name.split("-")[0] for name in shipped_recipes()}
    assert families == {name.split("-")[0] for name in named}
