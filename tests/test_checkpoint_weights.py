"""Tensors of a checkpoint match the network's for each family; preprocessing has two files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from discl.errors import CheckpointError
from discl.models.classifier import (
    ClassifierConfig,
    build_classifier,
    load_classifier,
    save_classifier,
)
from discl.prompts.captions import Captioner
from discl.recipe import Train
from discl.spectrum.clip_filter import ClipScorer
from discl.spectrum.models import load_generator, load_plain
from discl.stages.classifiers import describe_classifier
from helpers.captioners import save_blip
from helpers.vit import make_vit_config, train_from


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_diffusion: Path
) -> dict[str, Path]:
    from transformers import ViTForImageClassification

    root = tmp_path_factory.mktemp("weights")
    ViTForImageClassification(make_vit_config(2)).save_pretrained(root / "vit")
    own = ClassifierConfig("resnet10", "3x3", 8, ("a", "b"), 32, 32, (0.5,) * 3, (0.5,) * 3)
    save_classifier(build_classifier(own), own, root / "own")
    return {
        "vit": root / "vit",
        "own": root / "own",
        "blip": save_blip(root / "blip"),
        "clip": tiny_clip,
        "diffusion": tiny_diffusion,
    }


CLIPS: dict[str, Callable[[Path], Any]] = {
    "filter": lambda folder: ClipScorer(str(folder), {0: "a"}),
    "classifier": lambda folder: train_from(folder, "clip"),
    "FLYP": lambda folder: train_from(folder, "clip", "flyp"),
}
LOAD: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    **{name: ("clip", "model.safetensors", load) for name, load in CLIPS.items()},
    "own classifier": ("own", "model.safetensors", load_classifier),
    "classifier of transformers": (
        "vit",
        "model.safetensors",
        lambda folder: train_from(folder, "transformers"),
    ),
    "captions": ("blip", "model.safetensors", lambda folder: Captioner(str(folder))),
    **{
        part: ("diffusion", f"{part}/{name}", lambda folder: load_generator(str(folder)))
        for part, name in {
            "unet": "diffusion_pytorch_model.safetensors",
            "vae": "diffusion_pytorch_model.safetensors",
            "text_encoder": "model.safetensors",
        }.items()
    },
    "plain unet": (
        "diffusion",
        "unet/diffusion_pytorch_model.safetensors",
        lambda folder: load_plain(str(folder)),
    ),
}


def copied(folders: dict[str, Path], family: str, to: Path) -> Path:
    return Path(shutil.copytree(folders[family], to / "copy"))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


BACKBONE = {"classifier of transformers": "vit.layers.9.weight"}


@pytest.mark.parametrize("kind", LOAD)
def test_surplus_and_missing_tensors_are_refused(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family, file, load = LOAD[kind]
    folder = copied(folders, family, tmp_path)
    surplus = BACKBONE.get(kind, "extra.weight")
    rewrite(folder / file, lambda tensors: tensors.update({surplus: torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=surplus.replace(".", r"\.")):
        load(folder)
    lost: list[str] = []

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[surplus]
        lost.append(next(name for name in sorted(tensors) if not name.startswith("classifier")))
        del tensors[lost[0]]

    rewrite(folder / file, lose)
    with pytest.raises(CheckpointError, match=r"[Mm]issing"):
        load(folder)


@pytest.mark.parametrize("kind", LOAD)
def test_a_tensor_of_another_shape_is_refused(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family, file, load = LOAD[kind]
    folder = copied(folders, family, tmp_path)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if not name.startswith("classifier"))
        tensors[name] = torch.zeros(*tensors[name].shape, 2)

    rewrite(folder / file, widen)
    with pytest.raises(CheckpointError):
        load(folder)


@pytest.mark.parametrize("kind", [name for name in LOAD if name != "own classifier"])
def test_counters_and_tables_of_positions_are_no_surplus(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family, file, load = LOAD[kind]
    folder = copied(folders, family, tmp_path)
    harmless = {
        "text_model.embeddings.position_ids": torch.arange(4),
        "x.num_batches_tracked": torch.tensor(1),
    }
    rewrite(folder / file, lambda tensors: tensors.update(harmless))
    load(folder)


INCOMPLETE = {
    "vision tower only": lambda name: name.startswith(("vision_model", "visual_projection")),
    "no projection": lambda name: "projection" not in name,
    "no text tower": lambda name: not name.startswith("text_model"),
    "no scale": lambda name: name != "logit_scale",
}


@pytest.mark.parametrize("loader", CLIPS)
@pytest.mark.parametrize("what", INCOMPLETE)
def test_an_incomplete_clip_is_refused_by_every_loader(
    loader: str, what: str, tiny_clip: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    kept = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if INCOMPLETE[what](name)
    }
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"clip' has no .* weights of its configuration are missing"
    ):
        CLIPS[loader](folder)


def test_heads_and_poolers_of_pretraining_are_left_behind(tmp_path: Path) -> None:
    """A backbone saved with its pooler, or the decoder of masked pretraining, gets a new head."""
    from transformers import ViTForMaskedImageModeling, ViTModel

    config = make_vit_config(1, encoder_stride=8)
    for kind in (ViTModel, ViTForMaskedImageModeling):
        kind(config).save_pretrained(tmp_path / kind.__name__)
        train_from(tmp_path / kind.__name__, "transformers")


@pytest.fixture
def of_transformers_5(tiny_clip: Path, tmp_path: Path) -> Path:
    """A CLIP of transformers 5: `processor_config.json` only, no default means and deviations."""
    from transformers import CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer

    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip5"))
    (folder / "preprocessor_config.json").unlink()
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 40},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
    )
    CLIPProcessor(images, CLIPTokenizer.from_pretrained(folder)).save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    return folder


def test_a_clip_saved_by_transformers_5_is_read_as_it_says(
    of_transformers_5: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    folder = of_transformers_5
    train = Train.model_validate(
        {"image_size": 32, "model": {"architecture": "clip", "checkpoint": str(folder)}}
    )
    config = describe_classifier(train, ("a", "b"))
    assert (config.resize, config.mean, config.std) == (40, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    older = Path(shutil.copytree(folder, tmp_path / "older"))
    told = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (older / "processor_config.json").unlink()
    (older / "preprocessor_config.json").write_text(json.dumps(told))
    pictures = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 44, 3), np.uint8))]
    one, other, plain = (
        ClipScorer(str(each), {0: "a boot"}).embed(pictures) for each in (folder, older, tiny_clip)
    )
    assert np.array_equal(one, other) and not np.allclose(one, plain)
    (folder / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    for load in CLIPS.values():
        with pytest.raises(CheckpointError, match=r"processor_config\.json"):
            load(folder)


QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("kind", "part", "quantised", "told"),
    [
        ("unet", "unet", QUANTISED, "needs the package bitsandbytes: pip install bitsandbytes"),
        (
            "text_encoder",
            "text_encoder",
            {"quant_method": "quanto"},
            "needs the package optimum-quanto",
        ),
        ("vae", "vae", {"quant_method": "of-nobody"}, "'of-nobody', which is not supported"),
        ("unet", "unet", "int8", "'int8', which is not supported"),
        ("captions", ".", {"load_in_8bit": True}, "needs the package bitsandbytes"),
        ("filter", ".", QUANTISED, "bitsandbytes"),
        ("classifier", ".", {"quant_method": "gptq"}, "gptqmodel"),
        ("classifier of transformers", ".", QUANTISED, "bitsandbytes"),
    ],
)
def test_quantised_weights_name_their_package(
    kind: str, part: str, quantised: Any, told: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family, _, load = LOAD[kind]
    folder = copied(folders, family, tmp_path)
    file = folder / part / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(CheckpointError, match=told):
        load(folder)


def test_quantised_weights_are_not_trained_even_with_their_package(
    tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTISED}))
    monkeypatch.setattr("discl.checkpoint_checks.QUANTISERS", {"bitsandbytes": "json"})
    for load in CLIPS.values():
        with pytest.raises(CheckpointError, match="needs full weights"):
            load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("hidden_size", 10**7),
        ("intermediate_size", 10**12),
        ("image_size", 10**7),
        ("num_hidden_layers", 10**400),
        ("vocab_size", 10**12),
        ("hidden_size", -4),
        ("patch_size", 0),
    ],
)
def test_a_configuration_far_beyond_its_files_takes_no_memory(
    key: str, value: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    for number, (family, load) in enumerate(
        [
            ("clip", CLIPS["filter"]),
            ("clip", CLIPS["classifier"]),
            ("vit", LOAD["classifier of transformers"][2]),
        ]
    ):
        folder = copied(folders, family, tmp_path / str(number))
        config = json.loads((folder / "config.json").read_text())
        places = [
            config,
            *(config[name] for name in ("text_config", "vision_config") if name in config),
        ]
        there = [place for place in places if key in place]
        if not there:
            continue
        there[-1][key] = value
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError):
            load(folder)


def test_a_single_file_with_more_than_its_configuration_takes_is_refused(
    tiny_diffusion: Path, tmp_path: Path
) -> None:
    from .spectrum.test_weights import write_single

    file = write_single(tiny_diffusion, tmp_path / "tiny.safetensors")
    load_generator(str(file))
    extra = {
        "model.diffusion_model.input_blocks.9.weight": torch.zeros(7),
        "model_ema.decay": torch.zeros(1),
    }
    rewrite(file, lambda tensors: tensors.update(extra))
    with pytest.raises(CheckpointError, match="7 more than the UNet2DConditionModel"):
        load_generator(str(file))
