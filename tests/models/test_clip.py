"""CLIP as a classifier: head, FLYP gradients, frozen towers, interpolation, saving."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from discl.errors import CheckpointError, TrainingError
from discl.models.classifier import ClassifierConfig, build_classifier, load_classifier
from discl.models.clip import ClipClassifier, interpolate
from discl.stages.classifiers import (
    describe_classifier,
    describe_training,
    ensemble_weights,
    starter_of,
)
from discl.training.inference import predict_logits
from discl.training.objectives import contrastive, make_objective
from discl.training.optim import make_optimizer
from discl.training.step import StepConfig, TrainState
from helpers.tuning import NAMES, make_samples, make_train, train_real
from helpers.vit import make_vit_config


def start(
    clip: Path | str, objective: str = "cross-entropy"
) -> tuple[ClipClassifier, ClassifierConfig]:
    config = describe_classifier(make_train(clip), NAMES, {"coat": "warm coat"}, objective)
    model = starter_of(config, make_train(clip), {"coat": "warm coat"})()
    assert isinstance(model, ClipClassifier)
    return model, config


def tune(
    clip: Path | str, folder: Path, fine_tune: str, objective: str = "cross-entropy", **stop: Any
) -> tuple[nn.Module, ClassifierConfig]:
    train = make_train(clip)
    config = describe_classifier(train, NAMES, None, objective)
    settings = describe_training(train, fine_tune, 12, torch.device("cpu"), epochs=train.epochs)
    if stop:
        settings = replace(settings, **stop)
    train_real(folder, objective, config, settings, make_model=starter_of(config, train))
    return load_classifier(folder)


def same(model: nn.Module, other: nn.Module, prefix: str = "") -> bool:
    tensors = other.state_dict()
    return all(
        torch.equal(tensor, tensors[name])
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix)
    )


@pytest.mark.parametrize("which", ["tiny", "embedded"])
def test_zero_shot_head_gives_the_scores_of_clip_itself(which: str, tiny_clip: Path) -> None:
    """Logits are `logits_per_image` of transformers; with two templates those of their mean."""
    from transformers import CLIPModel, CLIPTokenizer

    from discl.checkpoints import find_checkpoint

    folder = tiny_clip if which == "tiny" else find_checkpoint("embedded:fashion-mnist/clip")
    model, _ = start(folder)
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    embeddings = []
    for name in ("boot", "shirt", "warm coat"):
        texts = tokenizer(
            [f"a photo of {name}.", f"{name} in the wild."],
            padding=True,
            truncation=True,
            max_length=model.prompts.shape[2],
            return_tensors="pt",
        )
        with torch.inference_mode():
            both = clip(input_ids=texts.input_ids, pixel_values=images).text_embeds
        embeddings.append(both.mean(0) / both.mean(0).norm())
    with torch.inference_mode():
        seen = clip.get_image_features(pixel_values=images).pooler_output
        expected = (
            clip.logit_scale.exp()
            * (seen / seen.norm(dim=1, keepdim=True))
            @ torch.stack(embeddings).T
        )
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-4, atol=1e-4)


def test_head_is_made_of_the_texts_anew_at_every_evaluation(tiny_clip: Path) -> None:
    model, _ = start(tiny_clip, "flyp")
    zero_shot = model.head.weight.clone()
    assert torch.equal(model.train().eval().head.weight, zero_shot)
    model.train()
    with torch.no_grad():
        model.clip.text_projection.weight.add_(
            torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
        )
    assert torch.equal(model.head.weight, zero_shot)
    assert not torch.allclose(model.eval().head.weight, zero_shot)
    kept, _ = start(tiny_clip)
    kept.train()
    with torch.no_grad():
        kept.clip.text_projection.weight.mul_(-1)
    assert torch.equal(kept.eval().head.weight, zero_shot)


def test_flyp_reaches_both_towers_and_the_scale_but_not_the_head(tiny_clip: Path) -> None:
    model, _ = start(tiny_clip, "flyp")
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 2, 1, 0])
    contrastive(
        *model.train().pairs(images, labels, model.draw_prompts(len(labels))), model.scale
    ).backward()
    without_gradient = {
        name for name, parameter in model.named_parameters() if parameter.grad is None
    }
    assert without_gradient == {"head.weight", "head.bias"}
    for name in (
        "clip.vision_model.embeddings.patch_embedding.weight",
        "clip.text_model.embeddings.token_embedding.weight",
        "clip.logit_scale",
    ):
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None and gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("precision", "attention"), [(torch.bfloat16, "eager"), (torch.float32, "sdpa")]
)
def test_bfloat16_on_a_cpu_multiplies_plain_matrices(
    precision: torch.dtype, attention: str, tiny_clip: Path
) -> None:
    train = make_train(tiny_clip)
    model, config = start(tiny_clip, "flyp")
    sgd = partial(
        make_optimizer, name="sgd", lr=0.1, weight_decay=0.0, momentum=0.0, nesterov=False
    )
    x = torch.randn(6, 3, config.image_size, config.image_size)
    before = model.features(x), model.texts(model.prompts[:, 0])
    TrainState(
        model,
        sgd,
        objective=make_objective("flyp"),
        class_counts=np.ones(3),
        config=config,
        steps=StepConfig(),
        augment=tuple(train.augment),
        precision=precision,
        device="cpu",
    )
    assert model.clip.config.vision_config._attn_implementation == attention
    assert model.clip.config.text_config._attn_implementation == attention
    for old, new in zip(before, (model.features(x), model.texts(model.prompts[:, 0])), strict=True):
        torch.testing.assert_close(
            old, new
        )  # the same attention, causal mask of the texts included


def test_pairs_are_prompts_of_the_images_own_classes_drawn_at_random(tiny_clip: Path) -> None:
    model, _ = start(tiny_clip, "flyp")
    every: Tensor = model.texts(model.prompts.flatten(0, 1)).unflatten(0, (3, 2))
    labels = torch.tensor([2, 0, 1, 1] * 8)
    with torch.inference_mode():
        seen, texts = model.pairs(torch.zeros(32, 3, 32, 32), labels, model.draw_prompts(32))
    assert seen.shape == texts.shape == (32, 32)
    distance = (texts[:, None] - every[labels]).abs().amax(2)
    assert (distance.min(1).values < 1e-5).all()
    assert len(distance.argmin(1).unique()) == 2


def test_linear_probe_leaves_the_towers_alone_and_moves_the_head(
    tiny_clip: Path, tmp_path: Path
) -> None:
    tuned, _ = tune(tiny_clip, tmp_path, "linear-probe")
    begun, _ = start(tiny_clip)
    assert same(tuned, begun, "clip.")
    assert not same(tuned, begun, "head.")


def test_lp_ft_leaves_the_towers_alone_in_its_first_phase_only(
    tiny_clip: Path, tmp_path: Path
) -> None:
    begun, _ = start(tiny_clip)
    seen: list[bool] = []

    def validate(model: nn.Module) -> float:
        seen.append(same(model, begun, "clip.vision_model"))
        return 0.0

    train = make_train(tiny_clip)
    settings = replace(
        describe_training(train, "lp-ft", 12, torch.device("cpu"), epochs=3), validate_every=1
    )
    assert settings.steps.head_epochs == 1
    config = describe_classifier(train, NAMES)
    make_model = starter_of(config, train)
    train_real(
        tmp_path, "cross-entropy", config, settings, validate=validate, make_model=make_model
    )
    assert seen == [True, False, False]
    assert settings.learning_rate(0.0) == pytest.approx(1e-3)
    assert settings.learning_rate(1 / 3) == pytest.approx(
        1e-3 / 2
    )  # the warm-up of the second phase, two steps


def test_zero_shot_takes_no_step_and_reloads(tiny_clip: Path, tmp_path: Path) -> None:
    tuned, config = tune(tiny_clip, tmp_path, "zero-shot")
    begun = starter_of(config, make_train(tiny_clip))()
    assert same(tuned, begun)
    assert config.mean == (0.5, 0.5, 0.5)


def test_flyp_to_disk_and_back(tiny_clip: Path, tmp_path: Path) -> None:
    """The loaded model predicts alike, with the head of its tuned text tower."""
    tuned, config = tune(tiny_clip, tmp_path, "full", "flyp")
    begun, _ = start(tiny_clip, "flyp")
    assert isinstance(tuned, ClipClassifier)
    for tower in ("clip.vision_model", "clip.text_model", "clip.logit_scale"):
        assert not same(tuned, begun, tower)
    kept = tuned.head.weight.clone()
    tuned.rebuild_head()
    torch.testing.assert_close(tuned.head.weight, kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "history.jsonl",
        "model.safetensors",
    ]
    _, pixels = make_samples()
    again, _ = load_classifier(tmp_path)
    rows = np.arange(12)
    assert torch.equal(
        predict_logits(tuned, pixels, rows, config), predict_logits(again, pixels, rows, config)
    )


def test_interpolated_weights(tiny_clip: Path, tmp_path: Path) -> None:
    """α = 0 is the pretrained CLIP, α = 1 the tuned one; the head follows interpolated texts."""
    tuned, config = tune(tiny_clip, tmp_path, "full", "flyp")
    begun = starter_of(config, make_train(tiny_clip))().eval()
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits: list[Tensor] = []

    def measure(model: nn.Module) -> float:
        with torch.inference_mode():
            logits.append(model(images))
        return float(len(logits) == 2)

    with torch.inference_mode():
        first, last = begun(images), tuned(images)
    alpha, figures = ensemble_weights(begun, tuned, [0.0, 0.5, 1.0], measure)
    torch.testing.assert_close(logits[0], first)
    torch.testing.assert_close(logits[2], last)
    assert alpha == 0.5 and figures == {0.0: 0.0, 0.5: 1.0, 1.0: 0.0}
    half = tuned.state_dict()
    middle = (
        begun.state_dict()["clip.logit_scale"]
        + load_classifier(tmp_path)[0].state_dict()["clip.logit_scale"]
    ) / 2
    torch.testing.assert_close(half["clip.logit_scale"], middle)
    assert isinstance(tuned, ClipClassifier)
    head = tuned.head.weight.clone()
    tuned.rebuild_head()
    assert torch.equal(tuned.head.weight, head)


def test_the_pretrained_and_the_tuned_may_lie_on_different_devices() -> None:
    pretrained, tuned = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")
    ensemble_weights(pretrained, tuned, [0.0, 0.5, 1.0], lambda model: 0.0)
    assert tuned.weight.device.type == "meta"


def test_interpolation_by_hand() -> None:
    start, end = (
        {"a": torch.tensor([0.0, 4.0]), "n": torch.tensor(3)},
        {"a": torch.tensor([1.0, 0.0]), "n": torch.tensor(5)},
    )
    assert interpolate(start, end, 0.25)["a"].tolist() == [0.25, 3.0]
    assert interpolate(start, end, 0.25)["n"].item() == 5
    assert torch.equal(interpolate(start, end, 0.0)["a"], start["a"]) and torch.equal(
        interpolate(start, end, 1.0)["a"], end["a"]
    )


def test_norms_biases_and_the_scale_get_no_weight_decay(tiny_clip: Path) -> None:
    model, _ = start(tiny_clip, "flyp")
    decayed, plain = make_optimizer(
        model,
        name="adamw",
        lr=1e-5,
        weight_decay=0.2,
        momentum=0.9,
        nesterov=False,
        decay_vectors=False,
    ).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    bare = {names[id(parameter)] for parameter in plain["params"]}
    assert "clip.logit_scale" in bare and "clip.text_model.final_layer_norm.weight" in bare
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_the_scale_stays_below_a_hundred(tiny_clip: Path) -> None:
    model, _ = start(tiny_clip)
    with torch.no_grad():
        model.clip.logit_scale.fill_(7.0)
    model.clamp_scale()
    assert model.scale.item() == pytest.approx(100)


def test_flyp_killed_and_resumed_is_uninterrupted(tiny_clip: Path, tmp_path: Path) -> None:
    whole, _ = tune(
        tiny_clip,
        tmp_path / "whole",
        "full",
        "flyp",
        save_seconds=0.0,
        steps=StepConfig(ema=0.5),
    )
    train = make_train(tiny_clip)
    config = describe_classifier(train, NAMES, None, "flyp")
    settings = replace(
        describe_training(train, "full", 12, torch.device("cpu"), epochs=3),
        save_seconds=0.0,
        steps=StepConfig(ema=0.5),
    )

    def kill(record: dict[str, Any]) -> None:
        if record["epoch"] == 1:
            raise KeyboardInterrupt

    for on_epoch in (kill, lambda record: None):
        try:
            train_real(
                tmp_path / "killed",
                "flyp",
                config,
                settings,
                on_epoch=on_epoch,
                make_model=starter_of(config, train),
            )
        except KeyboardInterrupt:
            assert (tmp_path / "killed" / "checkpoint.safetensors").exists()
    assert same(load_classifier(tmp_path / "killed")[0], whole)


def test_what_does_not_fit_is_refused(
    tiny_clip: Path, tiny_diffusion: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"images of 32 pixels; set train\.image_size: 32"):
        describe_classifier(make_train(tiny_clip, image_size=64), NAMES)
    with pytest.raises(CheckpointError, match="cannot be loaded as a model of transformers"):
        describe_classifier(make_train(tiny_diffusion), NAMES)
    resnet = ClassifierConfig("resnet10", "3x3", 4, NAMES, 32, 32, (0.5,) * 3, (0.25,) * 3)
    settings = describe_training(make_train(tiny_clip), "full", 12, torch.device("cpu"), epochs=1)
    with pytest.raises(TrainingError, match="objective flyp needs a CLIP"):
        train_real(tmp_path, "flyp", resnet, settings)


@pytest.mark.parametrize("family", ["vit", "resnet", "convnext"])
def test_image_classifiers_of_transformers(family: str, tmp_path: Path) -> None:
    """From a folder with or without weights, saved and loaded without the folder."""
    from transformers import (
        ConvNextConfig,
        ConvNextForImageClassification,
        ResNetConfig,
        ResNetForImageClassification,
    )
    from transformers import ViTForImageClassification as Vit

    torch.manual_seed(0)
    made: Any = {
        "vit": lambda: Vit(make_vit_config(1)),
        "resnet": lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        "convnext": lambda: ConvNextForImageClassification(
            ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
        ),
    }[family]()
    made.save_pretrained(tmp_path / "theirs")
    train = make_train(
        "", model={"architecture": "transformers", "checkpoint": str(tmp_path / "theirs")}
    )
    config = describe_classifier(train, NAMES)
    begun = starter_of(config, train)()
    images = torch.randn(2, 3, 32, 32)
    assert begun(images).shape == (2, 3)
    theirs = made.base_model.state_dict()
    ours = begun.model.base_model.state_dict()  # type: ignore[union-attr]
    assert theirs.keys() == ours.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )
    fresh = starter_of(
        config, make_train("", model={**train.model.model_dump(), "pretrained": False})
    )()
    assert not all(
        torch.equal(tensor, theirs[name])
        for name, tensor in fresh.model.base_model.state_dict().items()
    )  # type: ignore[union-attr]
    settings = describe_training(train, "linear-probe", 12, torch.device("cpu"), epochs=1)
    make_model = starter_of(config, train)
    train_real(tmp_path / "ours", "cross-entropy", config, settings, make_model=make_model)
    (tmp_path / "theirs").rename(tmp_path / "gone")
    tuned, read = load_classifier(tmp_path / "ours")
    assert read == config
    assert all(
        torch.equal(tensor, theirs[name])
        for name, tensor in tuned.model.base_model.state_dict().items()
    )  # type: ignore[union-attr]


def test_timm_is_asked_for_where_it_is_missing(tmp_path: Path) -> None:
    try:
        import timm  # noqa: F401
    except ImportError:
        config = ClassifierConfig(
            "timm", "", 0, NAMES, 32, 32, (0.5,) * 3, (0.5,) * 3, backbone={"name": "resnet18"}
        )
        with pytest.raises(CheckpointError, match=r"pip install 'discl\[timm\]'"):
            build_classifier(config)
    else:
        config = ClassifierConfig(
            "timm", "", 0, NAMES, 32, 32, (0.5,) * 3, (0.5,) * 3, backbone={"name": "resnet18"}
        )
        assert build_classifier(config)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
