"""Where checkpoints lie, and that pickled weights are never taken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from discl.assets import embedded
from discl.checkpoints import (
    checkpoint_digest,
    find_checkpoint,
    find_stored_checkpoint,
    find_weights,
)
from discl.errors import CheckpointError, RecipeError


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else name)
    return folder


def test_folders_and_embedded_checkpoints_are_found(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "model", "unet/model.safetensors", "unet/old.bin")
    assert find_checkpoint(str(folder)) == folder
    assert find_checkpoint("embedded:fashion-mnist/clip") == embedded("embedded:fashion-mnist/clip")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = write_files(
        tmp_path, "unet/diffusion_pytorch_model.bin", "vae/vae.ckpt", "config.json"
    )
    with pytest.raises(
        CheckpointError,
        match=r"only pickled weights \(diffusion_pytorch_model\.bin, vae\.ckpt\)",
    ):
        find_checkpoint(str(folder))


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"there is no checkpoint folder '.*none'\. .* owner/name",
    ):
        find_checkpoint(str(tmp_path / "none"))
    with pytest.raises(
        CheckpointError, match="there is no checkpoint folder '~nobody-of-this-name/model'"
    ):
        find_checkpoint("~nobody-of-this-name/model")
    with pytest.raises(CheckpointError, match=r"empty' .* no \*\.safetensors file"):
        find_checkpoint(str(write_files(tmp_path / "empty", "config.json")))
    with pytest.raises(
        CheckpointError,
        match=r"config\.json' is a file",
    ):
        find_checkpoint(str(tmp_path / "empty" / "config.json"))


def test_the_hub_is_asked_for_no_pickled_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {
        "model_index.json",
        "unet/config.json",
        "unet/model.safetensors",
        "tokenizer/merges.txt",
    }
    pickled = {"sd.ckpt", "unet/model.bin", "unet/model.pt", "model.pkl", "model.pth"}
    asked: set[str] = set()

    def download(name: str, **options: Any) -> str:
        asked.update(filter_repo_objects(wanted | pickled, **options))
        return str(write_files(tmp_path / "hub", "model.safetensors"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_checkpoint("owner/name") == tmp_path / "hub"
    assert asked == wanted

    def refuse(name: str, **options: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        CheckpointError,
        match=r"'owner/other' .* could not be downloaded: no network",
    ):
        find_checkpoint("owner/other")


def test_a_download_is_told_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here: set[str] = {"vae/model.safetensors"}

    def download(name: str, dry_run: bool = False, **options: Any) -> Any:
        files = {"unet/model.safetensors": 5_100_000_000, "vae/model.safetensors": 300_000_000}
        if dry_run:
            return [
                SimpleNamespace(file_size=size, will_download=file not in here)
                for file, size in files.items()
            ]
        here.update(files)
        return str(write_files(tmp_path / "hub", *files))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    find_checkpoint("owner/name")
    assert "fetching 5.1 GB of owner/name from the hub, this once" in capsys.readouterr().err
    find_checkpoint("owner/name")
    assert not capsys.readouterr().err


def test_parts_that_the_hub_has_in_half_precision_only_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion.fp16.safetensors",
        "unet/diffusion.fp16-00001-of-00002.safetensors",
        "vae/config.json",
        "vae/diffusion.safetensors",
        "vae/diffusion.fp16.safetensors",
        "safety_checker/config.json",
    }

    def download(name: str, **options: Any) -> str:
        return str(write_files(tmp_path / "hub", *filter_repo_objects(there, **options)))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = find_checkpoint("owner/name")
    got = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert got == there - {"vae/diffusion.fp16.safetensors", "safety_checker/config.json"}


def test_the_digest_is_of_what_makes_the_pixels(tmp_path: Path) -> None:
    names = ("unet/model.safetensors", "tokenizer/merges.txt", "config.json")
    first = checkpoint_digest(write_files(tmp_path / "a", *names))
    assert (
        checkpoint_digest(write_files(tmp_path / "b", *names, "README.md", "picture.png")) == first
    )
    assert checkpoint_digest(write_files(tmp_path / "c", *names, "vae/model.safetensors")) != first


@pytest.mark.parametrize("find", [find_checkpoint, find_stored_checkpoint, find_weights])
def test_an_address_that_no_file_system_takes_is_shown_in_short(find: Any) -> None:
    for address in (
        "a" * 100_000,
        f"{'a' * 5_000}/{'b' * 5_000}",
        "embedded:fashion-mnist/" + "a" * 9_000,
    ):
        with pytest.raises((CheckpointError, RecipeError)) as raised:
            find(address)
        assert len(str(raised.value)) < 1000
