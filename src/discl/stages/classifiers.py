"""From the section `train` to a network, its input and its training settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import checkpoint_digest, find_checkpoint, local_path
from ..curriculum import schedule
from ..errors import CheckpointError, RecipeError, arguments_named
from ..models.classifier import ClassifierConfig, build_classifier
from ..models.clip import (
    ClipClassifier,
    clip_preprocessing,
    interpolate,
    read_clip_settings,
    tokenize,
    tower_of,
)
from ..models.light import (
    LightClassifier,
    light_settings,
    read_base,
    text_vectors,
)
from ..models.pretrained import (
    read_normalisation,
    read_timm_settings,
    read_transformers_settings,
    three_numbers,
)
from ..models.resnet import ARCHITECTURES
from ..prompts import class_prompts
from ..recipe import Train
from ..recipe.methods import Finish
from ..training.inference import choose_precision
from ..training.loop import TrainSettings
from ..training.objectives import FLYP
from ..training.optim import make_learning_rate, make_optimizer, two_phases
from ..training.step import StepConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as in every published recipe."""
FIXED_SIZE = {"vit", "deit", "beit", "swin", "swinv2"}
"""Families of transformers with networks for one image size."""
Numbers = tuple[float, float, float]


def describe_classifier(
    train: Train,
    class_names: tuple[str, ...],
    names: Mapping[str, str] | None = None,
    objective: str = "cross-entropy",
    fine_tune: str = "full",
) -> ClassifierConfig:
    """Returns the network and the input that a recipe's section `train` describes.

    - `names`: class names to use in texts, by class name.
    - `fine_tune`: of the method; `light` builds a frozen tower with adapters.

    Raises CheckpointError for a checkpoint of another family, for images of another size than
    `train.image_size`, and for light tuning of a network without the layers that it needs.
    """
    config = _describe(train, class_names, names, objective)
    if fine_tune == "light":
        config = _describe_light(config, train, names or {})
    return replace(config, mean=train.mean or config.mean, std=train.std or config.std)


def _describe(
    train: Train, class_names: tuple[str, ...], names: Mapping[str, str] | None, objective: str
) -> ClassifierConfig:
    model, size = train.model, train.image_size
    config = ClassifierConfig(
        model.architecture, "", 0, class_names, size, train.resize or size, MEAN, STD
    )
    if model.checkpoint is None:
        width = model.width or ARCHITECTURES[model.architecture]["width"]
        return replace(config, stem=model.stem, width=width, head=model.head)
    folder = find_checkpoint(model.checkpoint)
    if model.architecture == "clip":
        return _describe_clip(config, folder, train, names, objective)
    mean, std, _ = read_normalisation(folder) or (MEAN, STD, None)
    if model.architecture == "timm":
        return _describe_timm(config, folder, mean, std)
    backbone = read_transformers_settings(folder)
    own = backbone.get("image_size", size)
    if not isinstance(own, list) and backbone["model_type"] in FIXED_SIZE:
        _check_size("model", folder, own, size)
    return replace(config, mean=mean, std=std, backbone=backbone)


def _describe_clip(
    config: ClassifierConfig,
    folder: Path,
    train: Train,
    names: Mapping[str, str] | None,
    objective: str,
) -> ClassifierConfig:
    settings = read_clip_settings(folder)
    own, side, mean, std = clip_preprocessing(folder, settings)
    _check_size("CLIP", folder, own, config.image_size)
    tokens = _tokens(folder, train, config.class_names, names)
    backbone = {
        **settings,
        "prompts": tokens.shape[1],
        "prompt_length": tokens.shape[2],
        "rebuild": objective == FLYP,
    }
    return replace(config, resize=train.resize or side, mean=mean, std=std, backbone=backbone)


def _describe_light(
    config: ClassifierConfig, train: Train, names: Mapping[str, str]
) -> ClassifierConfig:
    """The configuration with a frozen tower, adapters and a head over its features."""
    if train.model.initial_head == "texts":
        check_texts(config.class_names, names)
    address, wanted = str(train.model.checkpoint), train.model.light
    backbone = dict(config.backbone or {})
    if config.architecture == "clip":
        backbone = {"vision_config": backbone["vision_config"]}
    with arguments_named(adapter="train.model.light.adapter"):
        light = light_settings(
            config.architecture,
            backbone,
            classes=len(config.class_names),
            image_size=config.image_size,
            adapter=wanted.adapter,
            width=wanted.width,
            head=wanted.head,
            scale=wanted.scale,
        )
    folder = find_checkpoint(address)
    own = address.startswith("embedded:") or not local_path(address).exists()
    light |= {
        "base": checkpoint_digest(folder),
        "checkpoint": address if own else str(folder.resolve()),
    }
    return replace(config, backbone=backbone, light=light)


def _describe_timm(
    config: ClassifierConfig, folder: Path, mean: Numbers, std: Numbers
) -> ClassifierConfig:
    backbone, preprocessing = read_timm_settings(folder)
    mean = three_numbers(folder, "mean", preprocessing.get("mean", mean))
    std = three_numbers(folder, "std", preprocessing.get("std", std), positive=True)
    size = config.image_size
    sizes = preprocessing.get("input_size", (3, size, size))
    own = int(three_numbers(folder, "input_size", sizes, positive=True)[-1])
    if preprocessing.get("fixed_input_size"):
        _check_size("model", folder, own, size)
    return replace(config, mean=mean, std=std, backbone=backbone)


def _check_size(kind: str, folder: Path, own: int, size: int) -> None:
    """Raises CheckpointError for a network that takes images of another size."""
    if own != size:
        raise CheckpointError(
            f"the {kind} '{folder}' is made for images of {own} pixels; set "
            f"train.image_size: {own} (got {size})."
        )


def starter_of(
    config: ClassifierConfig,
    train: Train,
    names: Mapping[str, str] | None = None,
    class_means: Callable[[nn.Module], Tensor] | None = None,
) -> Callable[[], nn.Module]:
    """Returns a function that makes the initial network, pretrained if the recipe says so.

    - `class_means`: returns the mean features of each class, `[classes, channels]`, by a network
      from pixels to features; for light tuning whose head starts from them.
    """

    def start() -> nn.Module:
        model: Any = build_classifier(config)
        if isinstance(model, LightClassifier):
            return _start_light(model, config, train, names, class_means)
        if train.model.checkpoint is not None and train.model.pretrained:
            folder = find_checkpoint(train.model.checkpoint)
            if isinstance(model, ClipClassifier):
                model.load_pretrained(folder, _tokens(folder, train, config.class_names, names))
            else:
                model.load_pretrained(folder)
        return model

    return start


def check_texts(class_names: Sequence[str], names: Mapping[str, str]) -> None:
    """Raises RecipeError for a class without a name to make its text of."""
    for name in class_names:
        if not names.get(name, name).strip():
            raise RecipeError(
                f"class '{name}' has no name to make its text of, and light.initial_head is texts; "
                "name it in prompts.names, or use class-means or random.",
                argument="prompts.names",
            )


def _start_light(
    model: LightClassifier,
    config: ClassifierConfig,
    train: Train,
    names: Mapping[str, str] | None,
    class_means: Callable[[nn.Module], Tensor] | None,
) -> LightClassifier:
    """Loads the frozen tower, and starts the head from texts, class means or at random."""
    folder, vectors = find_checkpoint(str(train.model.checkpoint)), None
    if config.architecture == "clip" and train.model.initial_head == "texts":
        tokens = _tokens(folder, train, config.class_names, names)
        shape = {"prompts": tokens.shape[1], "prompt_length": tokens.shape[2], "rebuild": False}
        clip = ClipClassifier({**read_clip_settings(folder), **shape}, len(config.class_names))
        clip.load_pretrained(folder, tokens)
        model.load_base(tower_of(clip.clip))
        vectors = text_vectors(clip)
    else:
        model.load_base(read_base(folder, config.architecture, config.backbone or {}))
    if train.model.initial_head == "class-means" and class_means is not None:
        vectors = class_means(model.tower)
    if vectors is not None:
        model.set_head(vectors)
    return model


def checkpoint_identity(train: Train) -> str | None:
    """Returns a digest of the checkpoint that training begins with, None without one."""
    return (
        checkpoint_digest(find_checkpoint(train.model.checkpoint))
        if train.model.checkpoint is not None
        else None
    )


def describe_training(
    train: Train,
    fine_tune: str,
    real_images: int,
    device: torch.device,
    *,
    epochs: int,
    finish: Finish | None = None,
) -> TrainSettings:
    """Returns how a method is trained.

    - `fine_tune`: full, linear-probe, lp-ft, light, or zero-shot, which has no epoch at all.
    - `real_images`: real training images, which an epoch of the default length has once.
    - `finish`: the last epochs; with `head_only` they have a learning rate of their own.
    """
    optimizer = train.optimizer
    steps = train.steps_per_epoch or -(-real_images // train.batch_size)
    last = finish.epochs if finish is not None and finish.head_only else 0
    first = epochs - last
    head_epochs = {
        "linear-probe": epochs,
        "lp-ft": min(train.head_epochs or -(-first // 4), first - 1),
    }.get(fine_tune, 0)
    alone = head_epochs if fine_tune == "lp-ft" else 0
    decays = (
        optimizer.decay_vectors
        if optimizer.decay_vectors is not None
        else train.model.architecture in ARCHITECTURES
    )
    return TrainSettings(
        epochs=0 if fine_tune == "zero-shot" else epochs,
        steps_per_epoch=steps,
        batch_size=train.batch_size,
        augment=tuple(train.augment),
        make_optimizer=partial(
            make_optimizer,
            name=optimizer.name,
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            momentum=optimizer.momentum,
            nesterov=optimizer.nesterov,
            decay_vectors=decays,
        ),
        learning_rate=_describe_rate(
            train, finish, first=first, last=last, alone=alone, steps=steps
        ),
        precision=choose_precision(train.precision, device),
        seed=train.seed,
        select=train.select,
        finish=None
        if finish is None
        else schedule.Finish(epochs - finish.epochs, finish.head_only, finish.new_head),
        steps=StepConfig(
            crop_scale=train.crop_scale,
            mixup=train.mixup,
            cutmix=train.cutmix,
            accumulate=train.accumulate,
            ema=train.ema,
            head_epochs=head_epochs,
        ),
    )


def _describe_rate(
    train: Train, finish: Finish | None, *, first: int, last: int, alone: int, steps: int
) -> Callable[[float], float]:
    """The learning rate of a training.

    - `first`, `last`: epochs before the head has a rate of its own at the end, and of that end.
    - `alone`: epochs at the beginning that train the head alone.
    - `steps`: of an epoch.
    """
    optimizer, tuned = train.optimizer, max(1, first - alone)
    warm_up: float = min(optimizer.warm_up_epochs, tuned - 1)
    if optimizer.warm_up_steps:
        warm_up = min(optimizer.warm_up_steps / steps, tuned)
    rate = make_learning_rate(
        optimizer.lr,
        optimizer.schedule,
        tuned,
        warm_up,
        milestones=optimizer.milestones,
        warm_up_steps=optimizer.warm_up_steps or 0,
        factor=optimizer.factor,
    )
    if alone:
        rate = two_phases(make_learning_rate(train.head_lr, "cosine", alone), rate, alone / first)
    if finish is not None and last:
        own = make_learning_rate(finish.lr or optimizer.lr, "cosine", last)
        rate = two_phases(rate, own, first / (first + last))
    return rate


def ensemble_weights(
    pretrained: nn.Module,
    tuned: nn.Module,
    alphas: Sequence[float],
    measure: Callable[[nn.Module], float],
) -> tuple[float, dict[float, float]]:
    """Ensembles weights (arXiv 2109.01903); returns (best α, `{α: figure}`).

    - `pretrained`, `tuned`: may be on different devices. `tuned` is left with the interpolation of
      the best α, the first of equal ones.
    - `measure`: returns the figure of a model. A head that follows the text tower is rebuilt
      before.
    """
    end = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    start = {
        name: tensor.to(end[name].device, copy=True)
        for name, tensor in pretrained.state_dict().items()
    }

    def interpolate_to(alpha: float) -> None:
        tuned.load_state_dict(interpolate(start, end, alpha))
        if isinstance(tuned, ClipClassifier) and tuned.rebuilds:
            tuned.rebuild_head()

    figures = {}
    tuned.eval()
    for alpha in alphas:
        interpolate_to(alpha)
        figures[alpha] = measure(tuned)
    best = max(figures, key=lambda alpha: figures[alpha])
    interpolate_to(best)
    return best, figures


def _tokens(
    folder: Path, train: Train, class_names: tuple[str, ...], names: Mapping[str, str] | None
) -> Tensor:
    return tokenize(folder, class_prompts(class_names, train.model.templates, names=names))
