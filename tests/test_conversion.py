"""`discl convert`: pickled checkpoints of every layout become safetensors; no file runs code."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from discl.checkpoints import find_weights
from discl.cli import app
from discl.conversion import convert_checkpoint, target_name
from discl.errors import CheckpointError
from discl.spectrum.clip_filter import ClipScorer
from discl.spectrum.models import describe_generator, load_generator
from discl.unpickling import Refused, read_tensors
from helpers.hub_server import serve


class Hostile:
    """Unpickled by the ordinary unpickler, it writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"echo > {self.canary}",)


def pickled(source: Path, folder: Path, shards: int = 1, dtype: Any = None) -> Path:
    """A copy of a checkpoint folder with pickled files, named as before safetensors."""
    shutil.copytree(source, folder)
    for file in list(folder.rglob("*.safetensors")):
        tensors = load_file(file)
        if dtype is not None:
            tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        stem = "pytorch_model" if file.stem == "model" else file.stem
        names, where = sorted(tensors), {}
        for part in range(shards):
            of = f"-{part + 1:05d}-of-{shards:05d}" if shards > 1 else ""
            own = names[part::shards]
            torch.save({name: tensors[name] for name in own}, file.with_name(f"{stem}{of}.bin"))
            where |= dict.fromkeys(own, f"{stem}{of}.bin")
        if shards > 1:
            index = {"metadata": {}, "weight_map": where}
            file.with_name(f"{stem}.bin.index.json").write_text(json.dumps(index))
        file.unlink()
    return folder


def contents(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_a_clip_is_converted_and_scores_as_before(
    tiny_clip: Path, tmp_path: Path, shards: int
) -> None:
    source = pickled(tiny_clip, tmp_path / "old", shards)
    (source / "code.py").write_text("raise SystemExit")
    torch.save({"lr": 1.0}, source / "optimizer.pt")
    out = convert_checkpoint(str(source), tmp_path / "new" / "clip")
    expected = set(contents(tiny_clip)) - {"model.safetensors"}
    names = {"model.safetensors"} if shards == 1 else {"model.safetensors.index.json"}
    names |= {f"model-{part:05d}-of-00003.safetensors" for part in range(1, 4) if shards > 1}
    assert set(contents(out)) == expected | names
    pictures = [Image.fromarray(np.full((32, 32, 3), shade, np.uint8)) for shade in (10, 200)]
    before, after = (
        ClipScorer(str(folder), {0: "a boot"}).embed(pictures) for folder in (tiny_clip, out)
    )
    assert np.array_equal(before, after)
    assert contents(tmp_path / "new") == [f"clip/{name}" for name in contents(out)]


@pytest.mark.slow
def test_a_generator_of_many_parts_is_converted(tiny_diffusion: Path, tmp_path: Path) -> None:
    source = pickled(tiny_diffusion, tmp_path / "old", dtype=torch.float16)
    (source / "safety_checker").mkdir()
    torch.save({"a": torch.ones(1)}, source / "safety_checker" / "pytorch_model.bin")
    torch.save({"a": torch.ones(1)}, source / "v1-5-pruned.ckpt")
    torch.save({"a": torch.ones(1)}, source / "vae" / "diffusion_pytorch_model.fp16.bin")
    with pytest.raises(CheckpointError, match=r"discl convert \S+old old-safetensors"):
        describe_generator(str(source))
    out = convert_checkpoint(str(source), tmp_path / "new")
    assert contents(out) == contents(tiny_diffusion)
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        was = load_file(tiny_diffusion / name)
        for key, tensor in load_file(out / name).items():
            assert torch.equal(tensor, was[key].half()) and tensor.dtype == torch.float16
    load_generator(str(out))


@pytest.mark.slow
def test_one_file_is_converted_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    torch.save(
        {"state_dict": {"a": torch.arange(3.0)}, "epoch": 3}, tmp_path / "style.ckpt"
    )  # as trainers write it
    with pytest.raises(CheckpointError, match=r"discl convert \S*style\.ckpt style-safetensors"):
        find_weights(str(tmp_path / "style.ckpt"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit(9)")  # code of the folder one is in
    done = CliRunner().invoke(app, ["convert", "style.ckpt", "style-safetensors"])
    assert done.exit_code == 0 and done.stdout.strip() == "style-safetensors"
    found = find_weights("style-safetensors/style.safetensors")
    assert load_file(found)["a"].tolist() == [0, 1, 2]


def test_a_hostile_file_runs_nothing_and_leaves_nothing(tiny_clip: Path, tmp_path: Path) -> None:
    source, canary = pickled(tiny_clip, tmp_path / "old"), tmp_path / "canary"
    torch.save({"a": torch.ones(1), "b": Hostile(canary)}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: .*(posix|os)\.system"):
        convert_checkpoint(str(source), tmp_path / "new")
    assert not canary.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old"]
    action, arguments = Hostile(canary).__reduce__()  # what unpickling it would do
    action(*arguments)
    assert canary.exists()


def test_a_process_that_takes_too_long_is_given_up(tiny_clip: Path, tmp_path: Path) -> None:
    source = pickled(tiny_clip, tmp_path / "old")
    with pytest.raises(CheckpointError, match=r"not read within 0\.05 seconds"):
        convert_checkpoint(str(source), tmp_path / "new", seconds=0.05)
    assert not (tmp_path / "new").exists()


def _zip_bomb(file: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1_000_000)}, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(file, "w") as packed:
        for member in plain.infolist():
            packed.writestr(member, plain.read(member), zipfile.ZIP_DEFLATED)


SPOILT: dict[str, Any] = {
    "bomb": _zip_bomb,
    "expanded": lambda file: torch.save({"a": torch.zeros(1).expand(10**10)}, file),
    "cut off": lambda file: file.write_bytes(b"PK\x03\x04" + bytes(40)),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1"),
    "pickle": lambda file: file.write_bytes(pickle.dumps({"a": 1})),
    "list": lambda file: torch.save([torch.ones(1)], file),
    "no tensor": lambda file: torch.save({"a": torch.ones(1), "b": "text"}, file),
    "number as name": lambda file: torch.save({0: torch.ones(1)}, file),
    "sparse": lambda file: torch.save({"a": torch.eye(4).to_sparse()}, file),
    "huge storage": lambda file: file.write_bytes(
        (
            lambda buffer: (
                torch.save({"a": torch.zeros(5)}, buffer, _use_new_zipfile_serialization=False)
                or buffer.getvalue().replace(b"K\x05Nt", b"J\xff\xff\xff\x7fNt")
            )
        )(io.BytesIO())
    ),
    "module": lambda file: torch.save(torch.nn.Linear(2, 2), file),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_what_is_no_plain_set_of_tensors_is_refused(kind: str, tmp_path: Path) -> None:
    SPOILT[kind](tmp_path / "pytorch_model.bin")
    with pytest.raises(Refused) as raised:
        read_tensors(tmp_path / "pytorch_model.bin")
    assert len(str(raised.value)) < 300


def test_shared_and_cut_tensors_get_memory_of_their_own(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    named = {"a": weight, "tied": weight, "row": weight[1], "turned": weight.t()}
    torch.save(named, tmp_path / "x.bin")
    found = read_tensors(tmp_path / "x.bin")
    save_file(found, tmp_path / "x.safetensors")
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, named[name])


def test_a_folder_that_holds_something_is_not_written_to(tiny_clip: Path, tmp_path: Path) -> None:
    source = pickled(tiny_clip, tmp_path / "old")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"new' exists and is not an empty"):
        convert_checkpoint(str(source), tmp_path / "new")
    with pytest.raises(CheckpointError, match="nothing to convert"):
        convert_checkpoint(str(tiny_clip), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint '\./nowhere'"):
        convert_checkpoint("./nowhere", tmp_path / "other")
    (source / "vocab.json").unlink()
    (source / "vocab.json").symlink_to(tmp_path / "new" / "mine.txt")
    with pytest.raises(CheckpointError, match=r"vocab\.json links to .*mine\.txt"):
        convert_checkpoint(str(source), tmp_path / "other")
    lost = pickled(tiny_clip, tmp_path / "lost", shards=3)
    (lost / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match="holds 2 of the 00003 pickled files"):
        convert_checkpoint(str(lost), tmp_path / "other")
    assert contents(tmp_path / "new") == ["mine.txt"]
    assert not (tmp_path / "other").exists()


def test_names_of_files() -> None:
    assert [
        str(target_name(Path(name)))
        for name in (
            "pytorch_model.bin",
            "a/pytorch_model-00001-of-00002.bin",
            "pytorch_model.fp16.bin",
            "pytorch_lora_weights.bin",
            "unet/diffusion_pytorch_model.bin",
        )
    ] == [
        "model.safetensors",
        "a/model-00001-of-00002.safetensors",
        "model.fp16.safetensors",
        "pytorch_lora_weights.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.slow
def test_a_hub_name_with_pickled_weights_only(tiny_clip: Path, tmp_path: Path) -> None:
    """The real client with a small hub: loading fetches no pickled file, converting does."""
    remote = pickled(tiny_clip, tmp_path / "remote")
    (remote / "tf_model.h5").write_text("of another framework")
    out = tmp_path / "clip-b32"
    with serve(remote, "openai/clip") as (address, fetched):
        kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}

        def run(code: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-P", "-c", f"import discl.checkpoints, discl.cli\n{code}"]
            return subprocess.run(command, env=kept | hub, capture_output=True, text=True)

        refused = run("discl.checkpoints.find_checkpoint('openai/clip')").stderr
        assert "'openai/clip' holds only pickled weights (pytorch_model.bin)" in refused
        assert "`discl convert openai/clip clip-safetensors`" in refused
        assert "config.json" in fetched and "pytorch_model.bin" not in fetched
        done = run(f"discl.cli.app(['convert', 'openai/clip', {str(out)!r}])")
    assert done.returncode == 0 and done.stdout.strip() == str(out), done.stderr
    assert fetched.count("pytorch_model.bin") == 1 and "tf_model.h5" not in fetched
    assert contents(out) == contents(tiny_clip)
    ClipScorer(str(out), {0: "a boot"})
