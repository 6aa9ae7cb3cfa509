"""Run folders with truncated, empty, swapped or replaced files.

Every command gives a result or a DisclError. After the fixes that the errors name, the figures are
those of the intact folder.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from discl.errors import BrokenFileError, DisclError, WriteError
from discl.pipeline import run_until
from discl.recipe import validate
from discl.run_folder.open import open_run
from discl.stages.export import export
from discl.stages.predict import predict

MUTATIONS = (30, 30, 30, 30, 6)
"""Mutated run folders per part; the last part is the quick one."""
QUICK = len(MUTATIONS) - 1
CALLS = 5


@pytest.fixture(scope="module")
def tree(
    tmp_path_factory: pytest.TempPathFactory, tiny_diffusion: Path, tiny_clip: Path
) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("data")
    for split, counts in (("train", (4, 2)), ("validation", (1, 1)), ("test", (2, 2))):
        for label, count in enumerate(counts):
            folder = root / split / ("boot", "hat")[label]
            folder.mkdir(parents=True)
            for index in range(count):
                seed = [label, index, len(split)]
                noise = np.random.default_rng(seed).integers(0, 120, (32, 32, 3)) + 100 * label
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{index}.png")
    return {
        "name": "small",
        "data": {"root": str(root)},
        "hard": {"fewer_than": 3},
        "spectrum": {
            "checkpoint": str(tiny_diffusion),
            "levels": [50],
            "seeds": 1,
            "num_inference_steps": 2,
        },
        "filter": {"checkpoint": str(tiny_clip), "threshold": -1},
        "train": {
            "epochs": 1,
            "curriculum_epochs": 1,
            "batch_size": 2,
            "steps_per_epoch": 1,
            "image_size": 16,
            "model": {"architecture": "resnet10", "width": 4, "stem": "3x3"},
            "precision": "float32",
        },
        "methods": {"ce": {"strategy": "real-only"}, "discl": {"strategy": "diverse-to-specific"}},
        "runtime": {"device": "cpu", "threads": 1, "slots": 1, "shard_rows": 1},
    }


@pytest.fixture(scope="module")
def finished(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = open_run(validate(tree), tmp_path_factory.mktemp("runs") / "finished")
    run_until(run, "report")
    (run.folder / "locks").mkdir()
    (run.folder / "locks" / "left.json").write_text('{"what": 5}')
    return run.folder


def mutate(folder: Path, chance: random.Random) -> str:
    """Changes one or two files of a run in one of eight ways; returns what it did."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = chance.choice(files)
    name, content = file.relative_to(folder), file.read_bytes()
    kin = [each for each in files if each.suffix == file.suffix and each != file] or files
    other = chance.choice(kin)
    way = chance.choice(("cut", "empty", "junk", "kin", "delete", "swap", "folder", "flip"))
    if way == "cut":
        file.write_bytes(content[: chance.randrange(len(content) or 1)])
    elif way == "empty":
        file.write_bytes(b"")
    elif way == "junk":
        file.write_bytes(chance.randbytes(chance.randrange(1, 400)))
    elif way == "kin":
        file.write_bytes(other.read_bytes())
    elif way == "swap":
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif way == "flip" and content:
        place = chance.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
    else:
        file.unlink()
        if way == "folder":
            file.mkdir()
            (file / "mine.txt").write_text("x")
    return f"{way} {name} ({other.relative_to(folder)})"


def follow(error: DisclError, folder: Path) -> bool:
    """Does what an error advises; returns whether the next command needs --amend."""
    text = str(error)
    assert str(folder) in text, text
    if "--amend" in text:
        return True
    if isinstance(error, BrokenFileError) and error.path is not None:
        with_folder = "elete its folder" in text or f"delete {error.path.parent}" in text
        remove(error.path.parent if with_folder else error.path)
    elif isinstance(error, WriteError):
        remove(error.path)
    elif shard := re.search(r"shard (\S+\.parquet)", text):
        remove(Path(shard[1]))
    elif found := re.search(r"(?:write|folder|cache) ?(?:to )?(\S+?)[:' ]", text):
        remove(Path(found[1]))
    else:
        pytest.fail(text)
    return False


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "part", [*(pytest.param(part, marks=pytest.mark.slow) for part in range(QUICK)), QUICK]
)
def test_mutated_runs_come_to_the_same_figures(
    part: int, tree: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    chance = random.Random(part)
    recipe, wanted = validate(tree), json.loads((finished / "results.json").read_text())
    image = next(Path(tree["data"]["root"]).rglob("*.png"))
    for number in range(MUTATIONS[part]):
        folder = tmp_path / f"run-{number}"
        shutil.copytree(finished, folder)
        log = [f"part {part}, {number}: {mutate(folder, chance)}"]
        use = chance.choice(("evaluate", "evaluate", "evaluate", "report", "export", "predict"))
        amend = False
        try:
            if use == "predict":
                predict(folder, image, folder.with_suffix(".csv"))
        except DisclError as error:
            log.append(f"predict: {error}")
        for _ in range(CALLS):
            try:
                run = open_run(recipe, folder, amend)
                run_until(run, "report" if use == "report" else "evaluate")
                if use == "export":
                    export(run, "imagefolder", folder.with_suffix(".out"))
                break
            except DisclError as error:
                log.append(str(error))
                amend = follow(error, folder) or amend
            except Exception as error:
                error.add_note("\n".join(log))
                raise
        else:
            pytest.fail("\n".join(log))
        assert json.loads((folder / "results.json").read_text()) == wanted, log
        shutil.rmtree(folder)


@pytest.mark.parametrize("content", ["empty", "half", "foreign"])
def test_a_finished_method_whose_weights_are_broken_is_trained_again(
    content: str,
    tree: dict[str, Any],
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    weights = folder / "train" / "discl" / "model.safetensors"
    whole = weights.read_bytes()
    foreign = (folder / "train" / "discl" / "logits.safetensors").read_bytes()
    weights.write_bytes({"empty": b"", "half": whole[: len(whole) // 2]}.get(content, foreign))
    with pytest.raises(DisclError, match="holds no classifier"):
        predict(folder / "train" / "discl", Path(tree["data"]["root"]), tmp_path / "out.csv")
    run_until(open_run(validate(tree), folder), "evaluate")
    assert weights.read_bytes() == whole
    assert str(weights) in capsys.readouterr().err
    assert (folder / "results.json").read_bytes() == (finished / "results.json").read_bytes()


def test_a_cut_off_history_does_not_hinder_a_training_that_goes_on(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It resumes from the checkpoint, which has its own history, and writes the file again."""
    from discl.training import loop

    long = validate(tree | {"train": tree["train"] | {"epochs": 3}})
    run = open_run(long, tmp_path / "run")
    epoch, done = loop._Epochs.train, []

    def stop(*words: Any) -> Any:
        done.append(words[1])
        if len(done) == 3:
            raise KeyboardInterrupt
        return epoch(*words)

    with monkeypatch.context() as patched:
        patched.setattr(loop._Epochs, "train", stop)
        patched.setattr(loop.time, "monotonic", iter(range(0, 10**6, 100)).__next__)
        with pytest.raises(KeyboardInterrupt):
            run_until(run, "train")
    history = run.folder / "train" / "ce" / "history.jsonl"
    text = history.read_text()
    assert done == [0, 1, 2] and len(text.splitlines()) == 2
    history.write_text(text[:-20])
    run_until(run, "train")
    assert [json.loads(line)["epoch"] for line in history.read_text().splitlines()] == [0, 1, 2]


def test_writers_on_a_disk_that_refuses_name_the_path(
    tree: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    """No user, not even root, can create a folder in a file or in /proc."""
    from discl.stages.init import write_starter

    file = tmp_path / "a file"
    file.touch()
    run = open_run(validate(tree), shutil.copytree(finished, tmp_path / "run"))
    images = Path(tree["data"]["root"])
    for place in (file / "below", Path("/proc/discl")):
        for write in (
            lambda place=place: write_starter(images, place / "birds.yaml"),
            lambda place=place: export(run, "imagefolder", place / "out"),
            lambda place=place: open_run(validate(tree), place / "run"),
        ):
            with pytest.raises(DisclError, match=str(place)):
                write()


def test_a_checkpoint_on_a_full_disk(tree: dict[str, Any], tmp_path: Path) -> None:
    """The error names it, no partial file is left, and training resumes when there is room."""
    import resource

    run = open_run(validate(tree), tmp_path / "run")
    run_until(run, "filter")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limit[1]))
    try:
        with pytest.raises(
            DisclError, match=r"'train' cannot write: .*safetensors: File too large"
        ):
            run_until(run, "train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(run.folder.rglob("*.safetensors")) and not list(run.folder.rglob("*.new"))
    run_until(run, "train")
