"""A checkpoint is data: its Python, its kernels, its adapters and its paths are never followed."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import discl
from discl.checkpoints import find_checkpoint
from discl.errors import CheckpointError
from discl.models.classifier import load_classifier, save_classifier
from discl.prompts.captions import Captioner
from discl.recipe import Train
from discl.spectrum.clip_filter import ClipScorer
from discl.spectrum.models import check_generator, load_generator, load_plain
from discl.stages.classifiers import describe_classifier, starter_of
from helpers.captioners import save_blip
from helpers.vit import make_vit_config, train_from

SOURCES = sorted(Path(discl.__file__).parent.rglob("*.py"))
LOADERS = {"from_pretrained", "from_config", "from_single_file", "pipeline", "create_model"}
WITHOUT = {
    "DDIMScheduler.from_config",
    "FlowMatchEulerDiscreteScheduler.from_config",
    "kind.from_config",
    "kind.from_single_file",
    "network.from_config",
    "pipeline",
    "timm.create_model",
    "type(scheduler).from_config",
}
"""They take no such argument.

One fixed class, a scheduler, a class looked up in diffusers, a pipeline that is called, a name of
timm.
"""


def calls() -> list[tuple[str, ast.Call]]:
    return [
        (ast.unparse(node.func), node)
        for path in SOURCES
        if not path.name.startswith("make_")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] in LOADERS | {"load_lora_weights"}
    ]


def test_every_load_says_that_no_code_of_a_checkpoint_is_trusted() -> None:
    found = calls()
    assert len(found) >= 15
    for name, call in found:
        words = {word.arg: word.value for word in call.keywords}
        assert "custom_pipeline" not in words
        if name.endswith("load_lora_weights") or name in WITHOUT:
            continue
        if name == "network.from_pretrained":  # diffusers' networks do not know the word
            assert "trust_remote_code" in ast.unparse(call) or None in words
            continue
        assert ast.unparse(words["trust_remote_code"]) == "False", ast.unparse(call)


def test_no_source_trusts_code_of_a_checkpoint() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert "trust_remote_code=True" not in text and "trust_remote_code': True" not in text


CANARY = "import pathlib\npathlib.Path({!r}).write_text('ran')\nclass Own: pass\n"
AUTO = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
    "AutoImageProcessor",
    "AutoProcessor",
    "AutoTokenizer",
)


def poison(folder: Path, canary: Path, **changed: Any) -> Path:
    """Every configuration names a module beside it, which would write `canary`."""
    for file in list(folder.rglob("*.json")):
        if file.name in {"vocab.json", "tokenizer.json", "model_index.json"}:
            continue
        settings = json.loads(file.read_text())
        named: Any = dict.fromkeys(AUTO, "own.Own")
        named["AutoTokenizer"] = ["own.Own", "own.Own"]
        if file.name in {"preprocessor_config.json", "processor_config.json"}:
            named = dict.fromkeys(("AutoImageProcessor", "AutoProcessor"), "own.Own")
        file.write_text(json.dumps(settings | {"auto_map": named} | changed))
        for place in ("own.py", "custom_generate/generate.py", "pipeline.py"):
            (file.parent / place).parent.mkdir(exist_ok=True)
            (file.parent / place).write_text(CANARY.format(str(canary)))
    return folder


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_diffusion: Path
) -> dict[str, Path]:
    from transformers import ViTForImageClassification

    root = tmp_path_factory.mktemp("trust")
    ViTForImageClassification(make_vit_config(1)).save_pretrained(root / "vit")
    blip = save_blip(root / "blip")
    return {"vit": root / "vit", "blip": blip, "clip": tiny_clip, "diffusion": tiny_diffusion}


LOAD: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "filter": ("clip", lambda folder: ClipScorer(str(folder), {0: "a"})),
    "clip classifier": ("clip", lambda folder: train_from(folder, "clip")),
    "classifier": ("vit", lambda folder: train_from(folder, "transformers")),
    "captions": ("blip", lambda folder: Captioner(str(folder))),
    "generator": ("diffusion", lambda folder: load_generator(str(folder))),
    "plain generator": ("diffusion", lambda folder: load_plain(str(folder))),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What somebody who always says yes was asked."""
    questions: list[str] = []

    def say_yes(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", say_yes)
    return questions


@pytest.mark.parametrize("kind", LOAD)
def test_the_python_of_a_checkpoint_never_runs(
    kind: str, folders: dict[str, Path], tmp_path: Path, asked: list[str]
) -> None:
    """A known family loads as its plain class; a family that only the code knows is refused."""
    family, load = LOAD[kind]
    canary = tmp_path / "canary"
    folder = poison(Path(shutil.copytree(folders[family], tmp_path / "known")), canary)
    model = load(folder)
    parts = model if isinstance(model, tuple) else (model,)
    assert not any(type(part).__name__ == "Own" for part in parts)
    assert not canary.exists() and "own" not in sys.modules
    if family != "diffusion":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
        with pytest.raises(CheckpointError, match=r"own|code"):
            load(folder)
        assert not canary.exists()
    assert asked == []


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("unet", ["own", "Own"]),
        ("scheduler", ["own", "Own"]),
        ("tokenizer", ["antigravity", "Own"]),
        ("extra", ["os", "system"]),
        ("../diffusion", ["diffusers", "UNet2DConditionModel"]),
        ("unet", ["diffusers"]),
        ("unet", [["a"], {}]),
        ("unet", ["diffusers.utils", "x"]),
    ],
)
def test_an_index_names_no_module_and_no_folder_elsewhere(
    part: str, kind: list[Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    folder = poison(Path(shutil.copytree(folders["diffusion"], tmp_path / "own")), canary)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {part: kind}))
    for load in (lambda: check_generator(str(folder), 4), lambda: load_generator(str(folder))):
        with pytest.raises(CheckpointError, match=r"model_index\.json|module"):
            load()
    assert not canary.exists() and "antigravity" not in sys.modules


def test_a_pipeline_of_its_own_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = poison(Path(shutil.copytree(folders["diffusion"], tmp_path / "own")), canary)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"_class_name": ["pipeline", "Own"]})
    )
    with pytest.raises(CheckpointError, match=r"\['pipeline', 'Own'\]"):
        load_generator(str(folder))
    assert not canary.exists()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_the_hub_are_not_asked_for(
    key: str, nested: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    value: Any = {"": "owner/kernel"} if nested else "owner/kernel"
    (config["text_config"] if nested else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'owner/kernel'"):
        ClipScorer(str(folder), {0: "a"})


def test_an_adapter_does_not_lead_to_another_checkpoint(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["vit"], tmp_path / "vit"))
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folders["clip"]), "peft_type": "LORA"})
    )
    with pytest.raises(CheckpointError, match="adapter of another checkpoint"):
        train_from(folder, "transformers")
    index = Path(shutil.copytree(folders["diffusion"], tmp_path / "diffusion"))
    shutil.copy(folder / "adapter_config.json", index / "text_encoder")
    with pytest.raises(CheckpointError, match="adapter of another checkpoint"):
        load_generator(str(index))


@pytest.mark.parametrize(
    "named",
    ["../clip/model.safetensors", "/etc/passwd", "..\\x.safetensors", "x.bin", 3, None, ["x"]],
)
def test_an_index_of_weights_stays_in_its_folder(
    named: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "sharded"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"logit_scale": named}})
    )
    with pytest.raises(CheckpointError, match=r"index\.json"):
        ClipScorer(str(folder), {0: "a"})


def test_pipes_and_links_to_nowhere_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "clip"))
    os.mkfifo(folder / "generation_config.json")  # who opens it waits for ever
    with pytest.raises(CheckpointError, match=r"generation_config\.json is a pipe or device"):
        find_checkpoint(str(folder))
    (folder / "generation_config.json").unlink()
    (folder / "loop.json").symlink_to(folder / "loop.json")
    with pytest.raises(CheckpointError, match=r"loop\.json links to"):
        find_checkpoint(str(folder))


@pytest.mark.parametrize(
    "backbone",
    [
        {"name": "hf-hub:owner/name"},
        {"name": "local-dir:/somewhere"},
        {"name": "vit_tiny_patch16_224", "model_args": {"checkpoint_path": "/weights.pth"}},
        {"name": "vit_tiny_patch16_224", "model_args": {"pretrained_cfg": {"file": "x.pth"}}},
        {"name": "vit_tiny_patch16_224", "model_args": {"pretrained": True}},
    ],
)
def test_a_classifier_of_somebody_else_names_no_weights_elsewhere(
    backbone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`discl predict` opens such folders. timm would fetch, or unpickle, what these name."""
    from helpers.timm_stand_in import import_or_stand_in

    timm = import_or_stand_in(monkeypatch)
    made: list[Any] = []
    monkeypatch.setattr(timm, "create_model", lambda *given, **named: made.append((given, named)))
    config = {
        "architecture": "timm",
        "stem": "",
        "width": 0,
        "class_names": ["a", "b"],
        "image_size": 32,
        "resize": 32,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "backbone": backbone,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not a model of timm's registry"):
        load_classifier(tmp_path)
    assert made == []


def test_a_classifier_of_somebody_else_asks_for_no_kernels(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    train = Train.model_validate(
        {
            "image_size": 32,
            "model": {"architecture": "transformers", "checkpoint": str(folders["vit"])},
        }
    )
    config = describe_classifier(train, ("a", "b"))
    save_classifier(starter_of(config, train)(), config, tmp_path)
    load_classifier(tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    plain["backbone"]["attn_implementation"] = "owner/kernel"
    (tmp_path / "config.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="'owner/kernel'"):
        load_classifier(tmp_path)
