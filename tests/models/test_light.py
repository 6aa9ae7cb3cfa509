"""Light tuning: adapters against references, the initial head by hand, what is trained and kept."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from discl.checkpoints import checkpoint_digest
from discl.curriculum.sampling import Pool
from discl.curriculum.schedule import Finish
from discl.errors import CheckpointError, RecipeError, TrainingError
from discl.models.classifier import ClassifierConfig, load_classifier, save_classifier
from discl.models.light import LightClassifier, auto_width
from discl.recipe import Train
from discl.stages.classifiers import (
    describe_classifier,
    describe_training,
    ensemble_weights,
    starter_of,
)
from discl.stages.light_start import check_start
from discl.training.checkpoint import read_history
from discl.training.inference import class_means, logits_of, predict_logits
from discl.training.step import StepConfig
from helpers.timm_stand_in import import_or_stand_in, save
from helpers.tuning import NAMES, make_samples, make_train, train_real

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def light_train(folder: Path, architecture: str = "clip", **light: Any) -> Train:
    model = {"architecture": architecture, "checkpoint": str(folder), "light": light}
    if architecture == "clip":
        model["templates"] = ["a photo of a {class}."]
    return make_train("", model=model, optimizer={"name": "sgd", "lr": 0.1})


def start(
    folder: Path, architecture: str = "clip", names: Sequence[str] = NAMES, **light: Any
) -> tuple[LightClassifier, ClassifierConfig]:
    train = light_train(folder, architecture, **light)
    config = describe_classifier(train, tuple(names), None, "cross-entropy", "light")
    torch.manual_seed(0)
    model = starter_of(config, train)()
    assert isinstance(model, LightClassifier)
    return model, config


def tune(folder: Path, target: Path, base: str = "clip", **changed: Any) -> LightClassifier:
    light = changed.pop("light", {})
    on_epoch = changed.pop("on_epoch", lambda record: None)
    train = light_train(folder, base, **light)
    config = describe_classifier(train, NAMES, None, "cross-entropy", "light")
    settings = describe_training(train, "light", 12, torch.device("cpu"), epochs=3)
    make_model = starter_of(config, train)
    train_real(
        target,
        "logit-adjusted",
        config,
        replace(settings, **changed),
        make_model=make_model,
        on_epoch=on_epoch,
    )
    model, _ = load_classifier(target)
    assert isinstance(model, LightClassifier)
    return model


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3


def test_an_adaptformer_equals_its_formula_in_every_block(tiny_clip: Path) -> None:
    """y = x' + MLP(LN(x')) + s · up(ReLU(down(norm(x')))), by functions (2205.13535, eq. 2)."""
    model, _ = start(tiny_clip, width=3)
    randomise(model)
    tower: Any = model.tower.model  # type: ignore[union-attr]
    weights = {name: each.detach() for name, each in model.adapters[0].named_parameters()}
    block = tower.encoder.layers[0]
    with torch.inference_mode():
        x = tower.pre_layrnorm(tower.embeddings(IMAGES))
        attended, _ = block.self_attn(block.layer_norm1(x), attention_mask=None)
        stream = x + attended
        normed = F.layer_norm(stream, (32,), weights["norm.weight"], weights["norm.bias"])
        down = (normed @ weights["down.weight"].T + weights["down.bias"]).clamp_min(0)
        beside = weights["scale"] * (down @ weights["up.weight"].T + weights["up.bias"])
        hidden = F.layer_norm(
            stream, (32,), block.layer_norm2.weight, block.layer_norm2.bias, eps=1e-5
        )
        inner = block.mlp.fc1(hidden)
        mlp = block.mlp.fc2(inner * torch.sigmoid(1.702 * inner))
        expected = tower.post_layernorm((stream + mlp + beside)[:, 0])
        torch.testing.assert_close(model.features(IMAGES), expected, rtol=1e-5, atol=1e-5)
        logits = 25 * F.normalize(expected, dim=1) @ F.normalize(model.head.weight, dim=1).T
        torch.testing.assert_close(model(IMAGES), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["clip", "transformers"])
def test_lora_equals_the_model_of_peft(base: str, tiny_clip: Path, vit: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionModel, ViTForImageClassification

    folder = tiny_clip if base == "clip" else vit
    kind: Any = CLIPVisionModel if base == "clip" else ViTForImageClassification
    model, _ = start(folder, base, adapter="lora", width=3)
    randomise(model)
    theirs = get_peft_model(
        kind.from_pretrained(folder, dtype=torch.float32),
        LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"]),
    ).eval()
    own = {name.rpartition("model.encoder.")[2]: each for name, each in model.state_dict().items()}
    own = {name.rpartition("vit.")[2]: each for name, each in own.items()}
    copied = 0
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            plain = name.rpartition("encoder." if base == "clip" else "vit.")[2]
            parameter.data = own[plain.replace(".default.", ".light.")]
            copied += 1
    assert copied == 4 * (1 if base == "clip" else 2)
    with torch.inference_mode():
        if base == "clip":
            expected = theirs(pixel_values=IMAGES).pooler_output
        else:
            vit_model = theirs.base_model.model.vit
            expected = vit_model(pixel_values=IMAGES).last_hidden_state[:, 0]
        torch.testing.assert_close(model.eval().features(IMAGES), expected, rtol=1e-5, atol=1e-5)


def zero_shot_parts(folder: Path) -> tuple[Any, Tensor]:
    """(transformers' CLIP, its normalised text embeddings of the classes)."""
    from transformers import CLIPModel, CLIPTokenizer

    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    texts = CLIPTokenizer.from_pretrained(folder)(
        [f"a photo of a {name}." for name in NAMES],
        padding=True,
        truncation=True,
        max_length=16,
        return_tensors="pt",
    )
    with torch.inference_mode():
        found = clip.get_text_features(input_ids=texts.input_ids).pooler_output
        return clip, found / found.norm(dim=1, keepdim=True)


def test_the_head_starts_as_the_texts_before_the_projection(tiny_clip: Path) -> None:
    """w = normalise(normalise(t) · Pᵀ); before the first step the tower is the frozen one.

    Logits are 25 · cos(w, x), and those of zero-shot CLIP are ∝ (t · Pᵀ) · x, so the two differ by
    the norm of t · Pᵀ alone.
    """
    model, _ = start(tiny_clip)
    clip, texts = zero_shot_parts(tiny_clip)
    with torch.inference_mode():
        projected = texts @ clip.visual_projection.weight
        norms = projected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(model.head.weight, projected / norms, rtol=0, atol=1e-6)
        seen = clip.vision_model(pixel_values=IMAGES).pooler_output
        torch.testing.assert_close(model.features(IMAGES), seen, rtol=0, atol=1e-6)
        zero_shot = texts @ clip.visual_projection(seen).T
        norm = seen.norm(dim=1)
        torch.testing.assert_close(
            model(IMAGES) / 25, (zero_shot / norms).T / norm[:, None], rtol=1e-5, atol=1e-6
        )


def test_a_start_ranks_first_what_zero_shot_clip_does_for_most_images(tiny_clip: Path) -> None:
    """Only the lengths of the projected texts differ; docs/classifiers.md has real CLIPs."""
    model, _ = start(tiny_clip)
    clip, texts = zero_shot_parts(tiny_clip)
    images = torch.randn(300, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        seen = clip.get_image_features(pixel_values=images).pooler_output
        same = (model(images).argmax(1) == (seen @ texts.T).argmax(1)).double().mean()
    assert same > 0.9


@pytest.mark.parametrize(
    "adapter",
    ["adaptformer", *(pytest.param(each, marks=pytest.mark.slow) for each in ("lora", "none"))],
)
def test_training_moves_and_keeps_the_light_part_alone(
    adapter: str, tiny_clip: Path, tmp_path: Path
) -> None:
    tuned = tune(tiny_clip, tmp_path / "run", light={"adapter": adapter})
    begun, config = start(tiny_clip, adapter=adapter)
    stored = load_file(tmp_path / "run" / "model.safetensors")
    trained = {name for name, each in begun.named_parameters() if each.requires_grad}
    assert stored.keys() == trained
    frozen = {name for name, _ in begun.named_parameters()} - trained
    assert len(frozen) > 10
    before, after = dict(begun.named_parameters()), dict(tuned.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["head.weight"], stored["head.weight"])
    _, pixels = make_samples()
    whole = predict_logits(tuned, pixels, np.arange(12), config)
    assert torch.equal(
        whole, predict_logits(load_classifier(tmp_path / "run")[0], pixels, np.arange(12), config)
    )


@pytest.mark.slow
@pytest.mark.parametrize("finish", [None, Finish(1, head_only=True, new_head=True)])
def test_a_killed_training_goes_on_to_the_same_bits(
    finish: Finish | None, tiny_clip: Path, tmp_path: Path
) -> None:
    """With `finish` it is killed after the first of two epochs that train the head alone."""
    more: Any = {"save_seconds": 0.0, "steps": StepConfig(ema=0.5), "finish": finish}
    whole = tune(tiny_clip, tmp_path / "whole", **more)

    def kill(record: dict[str, Any]) -> None:
        if record["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(tiny_clip, tmp_path / "killed", on_epoch=kill, **more)
    checkpoint = load_file(tmp_path / "killed" / "checkpoint.safetensors")
    assert not [name for name in checkpoint if "embeddings" in name]
    again = tune(tiny_clip, tmp_path / "killed", **more).state_dict()
    ended = whole.state_dict()
    assert all(torch.equal(each, again[name]) for name, each in ended.items())
    moved = {name for name in ended if not torch.equal(ended[name], checkpoint[f"average.{name}"])}
    assert (moved == {"head.weight"}) == (finish is not None)


@pytest.mark.slow
def test_bfloat16_trains_with_an_exact_head(tiny_clip: Path, tmp_path: Path) -> None:
    tuned = tune(tiny_clip, tmp_path, precision=torch.bfloat16)
    assert all(each.dtype == torch.float32 for each in tuned.state_dict().values())
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert tuned(IMAGES).dtype == torch.float32


def test_gradients_begin_at_the_first_adapter(tiny_clip: Path) -> None:
    """What is before it keeps no activations, and without adapters the whole tower keeps none."""
    seen: dict[str, bool] = {}
    model, _ = start(tiny_clip)
    tower: Any = model.tower.model  # type: ignore[union-attr]
    tower.encoder.layers[0].self_attn.register_forward_hook(
        lambda module, inputs, output: seen.update(attention=output[0].requires_grad)
    )
    assert model.train().features(IMAGES).requires_grad
    assert seen == {"attention": False} and not tower.training
    bare, _ = start(tiny_clip, adapter="none")
    assert not bare.train().features(IMAGES).requires_grad and bare(IMAGES).requires_grad


@pytest.mark.slow
def test_the_footprint_counts_what_is_trained_and_kept(tiny_clip: Path, tmp_path: Path) -> None:
    """By hand for a head alone: 3 vectors of 32 with momentum; most of a tower keeps nothing."""
    kept = {}
    for adapter in ("none", "adaptformer"):
        tune(tiny_clip, tmp_path / adapter, light={"adapter": adapter})
        kept[adapter] = read_history(tmp_path / adapter / "history.jsonl")
    bare, adapted = (kept[name][0] for name in ("none", "adaptformer"))
    model, _ = start(tiny_clip, adapter="none")
    parameters = sum(each.numel() for each in model.parameters())
    assert (bare["parameters"], bare["trained_parameters"]) == (parameters, 3 * 32)
    assert adapted["trained_parameters"] == 3 * 32 + 2 * 32 + (32 + 1) + (32 + 32) + 1
    stored = 4 * (parameters + 2 * 3 * 32)  # with gradients and momentum
    kept_by_the_head = bare["training_bytes"] - stored
    assert 4 * 6 * 32 <= kept_by_the_head < 4 * 6 * 32 * 4
    assert adapted["training_bytes"] > 3 * kept_by_the_head + stored
    assert "parameters" not in kept["none"][1]


@pytest.mark.slow
def test_another_base_is_refused_with_both_digests(tiny_clip: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_clip, tmp_path / "mine")
    tune(tmp_path / "mine", tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(tiny_clip, other)
    weights = load_file(other / "model.safetensors")
    save_file(
        {**weights, "logit_scale": weights["logit_scale"] + 1},
        other / "model.safetensors",
        {"format": "pt"},
    )
    own, theirs = checkpoint_digest(tmp_path / "mine"), checkpoint_digest(other)
    with pytest.raises(CheckpointError) as refused:
        load_classifier(tmp_path / "run", base=other)
    assert refused.value.argument == "base"
    assert own in str(refused.value) and theirs in str(refused.value)
    (tmp_path / "mine").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=rf"{own}, which is not here.*base=FOLDER"):
        load_classifier(tmp_path / "run")
    assert load_classifier(tmp_path / "run", base=tmp_path / "moved")[1].light["base"] == own  # type: ignore[index]
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    settings["light"]["base"] = theirs
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"digest {own}.* names {theirs}"):
        load_classifier(tmp_path / "run", base=other)


def test_a_base_is_not_fetched_for_a_folder_of_somebody_else(
    monkeypatch: pytest.MonkeyPatch, tiny_clip: Path, tmp_path: Path
) -> None:
    """A hub name is looked up in the cache alone; a folder without a config.json is not opened."""
    import huggingface_hub

    asked: list[Any] = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **options: asked.append(options) or (_ for _ in ()).throw(OSError(name)),
    )
    model, config = start(tiny_clip)
    (tmp_path / "theirs").mkdir()
    for address in ("owner/clip", str(tmp_path / "theirs"), "/", "embedded:../x"):
        light = {**(config.light or {}), "checkpoint": address}
        save_classifier(model, replace(config, light=light), tmp_path / "run")
        with pytest.raises(CheckpointError, match="which is not here"):
            load_classifier(tmp_path / "run")
    assert asked == [{"local_files_only": True}]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter", "prefix"),
        ("width", 0),
        ("width", True),
        ("head", None),
        ("scale", -1),
        ("checkpoint", 3),
    ],
)
def test_a_hostile_config_is_refused(key: str, value: Any, tiny_clip: Path, tmp_path: Path) -> None:
    model, config = start(tiny_clip, adapter="none")
    light = {**(config.light or {}), "adapter": "adaptformer", "width": 2, key: value}
    save_classifier(model, replace(config, light=light), tmp_path)
    with pytest.raises(CheckpointError, match=rf"light\.{key}"):
        load_classifier(tmp_path)


def test_a_light_part_brings_no_weights_of_the_tower(tiny_clip: Path, tmp_path: Path) -> None:
    tune(tiny_clip, tmp_path)
    file = tmp_path / "model.safetensors"
    name = "tower.model.post_layernorm.weight"
    digest = checkpoint_digest(tiny_clip)
    save_file({**load_file(file), name: torch.zeros(32)}, file, {"base": digest})
    with pytest.raises(CheckpointError, match=name):
        load_classifier(tmp_path)


@pytest.mark.slow
def test_weights_between_the_start_and_the_tuned_ones(tiny_clip: Path, tmp_path: Path) -> None:
    """α = 0 is the initial light part, α = 1 the tuned one; the tower is neither."""
    tuned = tune(tiny_clip, tmp_path)
    begun, _ = start(tiny_clip)
    first, last = begun.state_dict()["head.weight"].clone(), tuned.state_dict()["head.weight"]
    last = last.clone()
    heads: list[Tensor] = []

    def measure(model: nn.Module) -> float:
        heads.append(model.state_dict()["head.weight"].clone())
        return float(len(heads) == 2)

    alpha, _ = ensemble_weights(begun, tuned, [0.0, 0.5, 1.0], measure)
    assert alpha == 0.5 and torch.equal(heads[0], first) and torch.equal(heads[2], last)
    torch.testing.assert_close(heads[1], (first + last) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["adaptformer", "lora"])
def test_a_vit_of_transformers(adapter: str, vit: Path, tmp_path: Path) -> None:
    tuned = tune(vit, tmp_path / "run", "transformers", light={"adapter": adapter})
    assert not [name for name in tuned.state_dict() if "classifier" in name]
    again, config = load_classifier(tmp_path / "run")
    assert config.light is not None and config.light["width"] == 1
    with torch.inference_mode():
        assert torch.equal(again(IMAGES), tuned(IMAGES))


def test_class_means_by_hand(vit: Path) -> None:
    model, config = start(vit, "transformers")
    pool, pixels = make_samples()
    rows = np.arange(9)
    found = class_means(model.tower, pixels, rows, pool.labels[rows], config)
    with torch.inference_mode():
        features = predict_logits(model.tower, pixels, rows, config)
    unit = features / features.norm(dim=1, keepdim=True)
    for label in range(3):
        mean = unit[label::3].mean(0)
        torch.testing.assert_close(found[label], mean / mean.norm(), rtol=0, atol=1e-6)


def test_a_model_of_timm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timm = import_or_stand_in(monkeypatch)
    save(timm, tmp_path / "vit")
    model, _ = start(tmp_path / "vit", "timm", width=2, initial_head="random")
    theirs = load_file(tmp_path / "vit" / "model.safetensors")
    tower = dict(model.tower.named_parameters())
    assert all(
        torch.equal(tower[f"model.{name}"], each)
        for name, each in theirs.items()
        if not name.startswith("head.")
    )
    assert len(model.adapters) == 2
    model(IMAGES).sum().backward()
    assert model.adapters[0].up.weight.grad is not None  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="q and v as two linear layers in every block"):
        start(tmp_path / "vit", "timm", adapter="lora")


def test_networks_without_the_layers_are_refused(tmp_path: Path, tiny_clip: Path) -> None:
    from transformers import CLIPConfig, CLIPTextModel, ResNetConfig, ResNetForImageClassification

    ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).save_pretrained(tmp_path / "resnet")
    with pytest.raises(CheckpointError, match="a ResNetForImageClassification has none") as refused:
        start(tmp_path / "resnet", "transformers")
    assert refused.value.argument == "train.model.light.adapter"
    text = CLIPConfig.from_pretrained(tiny_clip).text_config
    CLIPTextModel(text).save_pretrained(tmp_path / "text")
    with pytest.raises(CheckpointError, match="clip_text_model"):
        start(tmp_path / "text")
    with pytest.raises(CheckpointError, match="clip_text_model"):
        start(tmp_path / "text", "transformers")


def test_a_class_without_a_text_is_refused(tiny_clip: Path) -> None:
    with pytest.raises(RecipeError, match=r"' '.*prompts\.names") as refused:
        start(tiny_clip, names=("boot", " ", "coat"))
    assert refused.value.argument == "prompts.names"
    start(tiny_clip, names=("boot", " ", "coat"), initial_head="random")


def test_a_start_is_checked_before_anything_is_generated() -> None:
    labels, no = np.array([0, 0, 2]), np.zeros(3, bool)
    pool = Pool(labels, np.full(3, 100), no, no, NAMES)
    with pytest.raises(TrainingError, match="'shirt' has none") as refused:
        check_start("class-means", pool, {})
    assert refused.value.argument == "train.model.light.initial_head"
    with pytest.raises(RecipeError, match="class 'coat' has no name"):
        check_start("texts", pool, {"coat": " "})
    check_start("texts", pool, {})
    check_start("random", pool, {"coat": " "})


@pytest.mark.parametrize(
    ("classes", "blocks", "width"),
    [(1000, 12, 32), (100, 12, 4), (8142, 12, 256), (1000, 24, 16), (10, 12, 1), (48, 12, 2)],
)
def test_the_width_of_the_adapters(classes: int, blocks: int, width: int) -> None:
    assert auto_width(classes, blocks) == width


def test_a_copy_shares_the_frozen_tower(tiny_clip: Path) -> None:
    model, _ = start(tiny_clip)
    copied = copy.deepcopy(model)
    for name, parameter in copied.named_parameters():
        same = parameter.data_ptr() == dict(model.named_parameters())[name].data_ptr()
        assert same != parameter.requires_grad
    with torch.no_grad():
        copied.adapters[0].up.weight.fill_(0.1)  # type: ignore[union-attr]
    with torch.inference_mode():
        assert not torch.equal(copied(IMAGES), model(IMAGES))


def test_logits_of_five_crops_are_their_mean(tiny_clip: Path) -> None:
    model, config = start(tiny_clip)
    generator = torch.Generator().manual_seed(0)
    squares = torch.randint(0, 256, (2, 3, 35, 35), generator=generator).to(torch.uint8)
    total = torch.zeros(2, 3)
    for top, left in ((0, 0), (0, 3), (3, 0), (3, 3), (1, 1)):
        total += logits_of(model, squares[..., top : top + 32, left : left + 32], config)
    torch.testing.assert_close(logits_of(model, squares, config, crops=5), total / 5)
