"""From the section `train` to a network, its input and its training settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import checkpoint_digest, find_checkpoint
from ..errors import CheckpointError
from ..models.classifier import ARCHITECTURES, ClassifierConfig, build_classifier
from ..models.clip import (
    ClipClassifier,
    clip_feeding,
    interpolate,
    read_clip_settings,
    tokenize,
)
from ..models.pretrained import (
    read_normalisation,
    read_timm_settings,
    read_transformers_settings,
    three_numbers,
)
from ..prompts import class_prompts
from ..recipe import Train
from ..training.loop import TrainSettings, choose_precision
from ..training.objectives import FLYP
from ..training.optim import make_learning_rate, make_optimizer, two_phases
from ..training.step import StepConfig

MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet's, as every published recipe has them


def describe_classifier(
    train: Train,
    class_names: tuple[str, ...],
    names: Mapping[str, str] | None = None,
    objective: str = "cross-entropy",
) -> ClassifierConfig:
    """The configuration of the network that a recipe asks for; `names` are those to use in texts.

    Raises CheckpointError for a checkpoint of another family, or one made for images of another size than `train.image_size`.
    """
    config = _describe(train, class_names, names, objective)
    return replace(config, mean=train.mean or config.mean, std=train.std or config.std)


def _describe(
    train: Train, class_names: tuple[str, ...], names: Mapping[str, str] | None, objective: str
) -> ClassifierConfig:
    asked = train.model
    size, resize = train.image_size, train.resize or train.image_size
    if asked.checkpoint is None:
        width = asked.width or ARCHITECTURES[asked.architecture]["width"]
        return ClassifierConfig(
            asked.architecture, asked.stem, width, class_names, size, resize, MEAN, STD, asked.head
        )
    folder = find_checkpoint(asked.checkpoint)
    if asked.architecture == "clip":
        settings = read_clip_settings(folder)
        own, side, mean, std = clip_feeding(folder, settings)
        if own != size:
            raise CheckpointError(
                f"the CLIP '{folder}' is made for images of {own} pixels; set train.image_size: {own} (got {size})."
            )
        tokens = _tokens(folder, train, class_names, names)
        backbone = {
            **settings,
            "prompts": tokens.shape[1],
            "prompt_length": tokens.shape[2],
            "rebuild": objective == FLYP,
        }
        return ClassifierConfig(
            "clip", "", 0, class_names, size, train.resize or side, mean, std, backbone=backbone
        )
    mean, std, _ = read_normalisation(folder) or (MEAN, STD, None)
    if asked.architecture == "timm":
        backbone, feeding = read_timm_settings(folder)
        mean = three_numbers(folder, "mean", feeding.get("mean", mean))
        std = three_numbers(folder, "std", feeding.get("std", std), positive=True)
        sizes = feeding.get("input_size", (3, size, size))
        own = int(three_numbers(folder, "input_size", sizes, positive=True)[-1])
        if own != size and feeding.get("fixed_input_size"):
            raise CheckpointError(
                f"the model '{folder}' is made for images of {own} pixels; set train.image_size: {own} (got {size})."
            )
        return ClassifierConfig(
            "timm", "", 0, class_names, size, resize, mean, std, backbone=backbone
        )
    backbone = read_transformers_settings(folder)
    own = backbone.get("image_size", size)
    if (
        own != size
        and not isinstance(own, list)
        and backbone["model_type"] in {"vit", "deit", "beit", "swin", "swinv2"}
    ):
        raise CheckpointError(
            f"the model '{folder}' is made for images of {own} pixels; set train.image_size: {own} (got {size})."
        )
    return ClassifierConfig(
        "transformers", "", 0, class_names, size, resize, mean, std, backbone=backbone
    )


def starter_of(
    config: ClassifierConfig, train: Train, names: Mapping[str, str] | None = None
) -> Callable[[], nn.Module]:
    """A function that gives the network to begin with: the checkpoint's where the recipe wants it pretrained, else a fresh one."""

    def start() -> nn.Module:
        model: Any = build_classifier(config)
        if train.model.checkpoint is not None and train.model.pretrained:
            folder = find_checkpoint(train.model.checkpoint)
            if isinstance(model, ClipClassifier):
                model.load_pretrained(folder, _tokens(folder, train, config.class_names, names))
            else:
                model.load_pretrained(
                    folder / "model.safetensors" if config.architecture == "timm" else folder
                )
        return model

    return start


def checkpoint_identity(train: Train) -> str | None:
    """Digest of the checkpoint that training begins with, None without one."""
    return (
        checkpoint_digest(find_checkpoint(train.model.checkpoint))
        if train.model.checkpoint is not None
        else None
    )


def describe_training(
    train: Train, fine_tune: str, real_images: int, device: torch.device, epochs: int
) -> TrainSettings:
    """How a method is trained: `fine_tune` is full, linear-probe, lp-ft or zero-shot, which takes no epoch at all."""
    asked = train.optimizer
    steps = train.steps_per_epoch or -(-real_images // train.batch_size)
    head_epochs = {
        "linear-probe": epochs,
        "lp-ft": min(train.head_epochs or -(-epochs // 4), epochs - 1),
    }.get(fine_tune, 0)
    tuned = max(1, epochs - (head_epochs if fine_tune == "lp-ft" else 0))
    warm_up: float = min(asked.warm_up_epochs, tuned - 1)
    if asked.warm_up_steps:
        warm_up = min(asked.warm_up_steps / steps, tuned)
    rate = make_learning_rate(
        asked.lr,
        asked.schedule,
        tuned,
        warm_up,
        asked.milestones,
        asked.warm_up_steps or 0,
        asked.factor,
    )
    if fine_tune == "lp-ft" and head_epochs:
        rate = two_phases(
            make_learning_rate(train.head_lr, "cosine", head_epochs), rate, head_epochs / epochs
        )
    decays = (
        asked.decay_vectors
        if asked.decay_vectors is not None
        else train.model.architecture in ARCHITECTURES
    )
    return TrainSettings(
        epochs=0 if fine_tune == "zero-shot" else epochs,
        steps_per_epoch=steps,
        batch_size=train.batch_size,
        augment=tuple(train.augment),
        make_optimizer=partial(
            make_optimizer, name=asked.name, lr=asked.lr, weight_decay=asked.weight_decay, momentum=asked.momentum,
            nesterov=asked.nesterov, decay_vectors=decays,
        ),
        learning_rate=rate,
        precision=choose_precision(train.precision, device),
        seed=train.seed,
        select=train.select,
        stepping=StepConfig(train.crop_scale, train.mixup, train.cutmix, train.accumulate, train.ema, head_epochs),
    )  # fmt: skip


def ensembles(
    pretrained: nn.Module,
    tuned: nn.Module,
    alphas: Sequence[float],
    measure: Callable[[nn.Module], float],
) -> tuple[float, dict[float, float]]:
    """(best α, `{α: measure}`) of weight ensembling (arXiv 2109.01903): `tuned` is left holding the interpolation of the best α.

    The two may lie on different devices. A head that follows the text tower is rebuilt after interpolation, before `measure(model)`.
    The first of equals is taken.
    """
    end = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    start = {
        name: tensor.to(end[name].device, copy=True)
        for name, tensor in pretrained.state_dict().items()
    }

    def become(alpha: float) -> None:
        tuned.load_state_dict(interpolate(start, end, alpha))
        if isinstance(tuned, ClipClassifier) and tuned.rebuilds:
            tuned.rebuild_head()

    figures = {}
    tuned.eval()
    for alpha in alphas:
        become(alpha)
        figures[alpha] = measure(tuned)
    best = max(figures, key=lambda alpha: figures[alpha])
    become(best)
    return best, figures


def _tokens(
    folder: Path, train: Train, class_names: tuple[str, ...], names: Mapping[str, str] | None
) -> Tensor:
    return tokenize(folder, class_prompts(class_names, train.model.templates, names=names))
