"""Section `train`: the classifier and its training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from ..errors import RecipeError, shorten
from ..models.classifier import FROM_CHECKPOINT
from ..models.resnet import ARCHITECTURES
from ..training.augmentation import AUGMENTATIONS
from .paths import PathOrName
from .types import Seed, Strict, Template, one_of

Channel = Annotated[float, Field(ge=-1, le=1)]

Channels = tuple[float, float, float]


def _positive(value: Channels) -> Channels:
    if min(value) <= 0 or max(value) > 10:
        raise RecipeError(
            f"got {list(value)}; standard deviations of pixels in [0, 1] are greater than 0 and at "
            "most 10."
        )
    return value


def _width(value: Any) -> Any:
    if value != "auto" and (not isinstance(value, int) or not 1 <= value <= 4096):
        raise RecipeError(f"got {shorten(value)}; write a whole number from 1 to 4096, or auto.")
    return value


class Light(Strict):
    """What `fine_tune: light` trains beside a frozen vision transformer."""

    adapter: Literal["adaptformer", "lora", "none"] = Field(
        "adaptformer",
        description="in every block of the image tower: a bottleneck beside the MLP, low-rank "
        "updates of q and v, or nothing",
    )
    width: Annotated[int | Literal["auto"], BeforeValidator(_width)] = Field(
        "auto",
        description="channels of a bottleneck, or rank of LoRA; auto: 2^⌊log2(classes / (2 · "
        "blocks))⌋, at least 1",
    )
    head: Literal["cosine", "linear"] = Field(
        "cosine",
        description="cosine: scale · cosine of features and class vectors; linear: weights and "
        "biases over the features as they are",
    )
    initial_head: Literal["texts", "class-means", "random"] | None = Field(
        None,
        description="initial vector of each class: its text, the mean of its training images, or "
        "random; null: texts for a CLIP, otherwise class-means",
    )
    scale: float = Field(25.0, gt=0, le=1000, description="cosine: factor of the cosines")

    @model_validator(mode="after")
    def _what_goes_together(self) -> Light:
        if self.adapter == "none" and self.width != "auto":
            raise RecipeError(
                f"width (got {self.width}) is of adapters, and adapter is none; remove one of them."
            )
        if self.head == "linear" and self.scale != Light.model_fields["scale"].default:
            raise RecipeError(
                f"scale (got {self.scale:g}) is of a cosine head, and head is linear; remove one "
                "of them."
            )
        return self


class Model(Strict):
    """The classifier: a residual network, or a checkpoint of transformers, timm or CLIP."""

    LATER = ("light",)

    architecture: Annotated[str, one_of("architecture", [*ARCHITECTURES, *FROM_CHECKPOINT])] = (
        "resnet10"
    )
    checkpoint: PathOrName | None = Field(
        None, description="transformers, timm, clip: folder or hub name"
    )
    pretrained: bool = Field(
        True,
        description="true: starts from the weights of the checkpoint; false: uses its architecture "
        "only",
    )
    templates: list[Template] = Field(
        ["a photo of {class}."], min_length=1, description="clip: prompts of each class"
    )
    head: Literal["linear", "cosine"] = "linear"
    stem: Literal["7x7", "3x3"] = "7x7"
    width: int | None = Field(
        None,
        ge=4,
        le=4096,
        description="channels of the first stage; null: the default of the architecture",
    )
    light: Light = Light()

    @model_validator(mode="after")
    def _checkpoint_where_one_is_needed(self) -> Model:
        needs = self.architecture in FROM_CHECKPOINT
        if needs and self.checkpoint is None:
            raise RecipeError(
                f"architecture {self.architecture} takes its network from a checkpoint; name one "
                "in train.model.checkpoint."
            )
        if not needs and self.checkpoint is not None:
            raise RecipeError(
                f"architecture {self.architecture} is built from scratch; remove checkpoint, or "
                "use transformers, timm or clip."
            )
        if needs and (self.head != "linear" or self.width is not None):
            raise RecipeError(
                "head: cosine and width are for the built-in residual networks; remove them for "
                f"architecture {self.architecture}."
            )
        if not self.pretrained and self.architecture == "clip":
            raise RecipeError(
                "architecture clip needs pretrained weights, because its head is made of its "
                "texts; remove pretrained."
            )
        if self.light.initial_head == "texts" and self.architecture != "clip":
            raise RecipeError(
                f"light.initial_head: texts needs a CLIP, because architecture {self.architecture} "
                "has no text tower; use class-means or random."
            )
        return self

    @property
    def initial_head(self) -> str:
        """What the head of light tuning starts from: texts, class-means or random."""
        return self.light.initial_head or (
            "texts" if self.architecture == "clip" else "class-means"
        )


class Optimizer(Strict):
    LATER = ("factor",)

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = Field(1e-3, gt=0, le=10_000)
    weight_decay: float = Field(0.0, ge=0, le=10_000)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    milestones: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.8, 0.9],
        max_length=1000,
        description="steps: fractions of the epochs after which lr is multiplied by factor",
    )
    factor: float = Field(0.01, gt=0, lt=1, description="steps: factor of lr after each milestone")
    warm_up_epochs: int = Field(0, ge=0, le=100_000)
    warm_up_steps: int | None = Field(
        None, ge=1, le=10**9, description="warm-up in updates; replaces warm_up_epochs"
    )
    decay_vectors: bool | None = Field(
        None,
        description="weight decay also on norms, biases and scales; null: for residual networks "
        "only, as in open_clip",
    )


class Train(Strict):
    """Phase 2: training settings of all methods, so that all have the same number of updates."""

    LATER = ("mean", "std", "resize_mode")

    epochs: int = Field(65, ge=1, le=100_000)
    curriculum_epochs: int = Field(
        60,
        ge=0,
        le=100_000,
        description="E_CL, epochs with synthetic images; later epochs have real images only",
    )
    batch_size: int = Field(128, ge=1, le=1_000_000)
    steps_per_epoch: int | None = Field(
        None, ge=1, le=10**8, description="updates in an epoch; null: training images / batch_size"
    )
    image_size: int = Field(224, ge=8, le=8192)
    resize: int | None = Field(
        None,
        ge=8,
        le=8192,
        description="size of images before augmentation; null: image_size",
    )
    resize_mode: Literal["square", "whole"] = Field(
        "square",
        description="source of the crops of random-resized-crop: the centre square, or the whole "
        "image",
    )
    augment: list[Annotated[str, one_of("augmentation", AUGMENTATIONS)]] = Field(
        ["random-resized-crop", "flip"]
    )
    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
        Field(
            (0.08, 1.0),
            description="smallest and largest fraction of the area for random-resized-crop; FLYP: "
            "[0.9, 1.0]",
        )
    )
    mixup: float = Field(0.0, ge=0, le=1000, description="α of Beta(α, α); 0 for off")
    cutmix: float = Field(0.0, ge=0, le=1000, description="α of Beta(α, α); 0 for off")
    accumulate: int = Field(
        1,
        ge=1,
        le=1_000_000,
        description="gradient accumulation: parts that a batch is divided into, to save memory",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a moving average of the weights, which is evaluated and saved "
        "instead",
    )
    head_epochs: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="lp-ft: first epochs, which train the head only; null: a quarter of all",
    )
    head_lr: float = Field(
        1e-3, gt=0, le=10_000, description="lp-ft: learning rate of the first epochs"
    )
    mean: tuple[Channel, Channel, Channel] | None = Field(
        None,
        description="mean of each channel, pixels in [0, 1]; null: of the checkpoint, else of "
        "ImageNet",
    )
    std: Annotated[Channels, AfterValidator(_positive)] | None = Field(
        None, description="standard deviation of each channel; null: as for mean"
    )
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    select: Literal["last", "validation"] = "last"
    seed: Seed = 0

    @model_validator(mode="after")
    def _epochs(self) -> Train:
        if self.curriculum_epochs > self.epochs:
            raise RecipeError(
                f"train.curriculum_epochs = {self.curriculum_epochs} exceeds train.epochs = "
                f"{self.epochs}; lower it."
            )
        if self.optimizer.warm_up_epochs >= self.epochs:
            raise RecipeError(
                f"train.optimizer.warm_up_epochs = {self.optimizer.warm_up_epochs} leaves none of "
                f"the {self.epochs} epochs; lower it."
            )
        if self.crop_scale[0] > self.crop_scale[1]:
            raise RecipeError(
                f"train.crop_scale = {list(self.crop_scale)} has the greater fraction first; swap "
                "them."
            )
        if self.batch_size % self.accumulate:
            raise RecipeError(
                f"train.batch_size = {self.batch_size} cannot be divided evenly into accumulate = "
                f"{self.accumulate} parts; change one of them."
            )
        if self.resize_mode == "whole" and "random-resized-crop" not in self.augment:
            raise RecipeError(
                "train.resize_mode = whole is for random-resized-crop, and train.augment = "
                f"{self.augment} has none; add it, or use resize_mode: square."
            )
        if self.head_epochs is not None and self.head_epochs >= self.epochs:
            raise RecipeError(
                f"train.head_epochs = {self.head_epochs} leaves none of the {self.epochs} epochs "
                "for the whole network; lower it."
            )
        if self.resize is not None and self.resize < self.image_size:
            raise RecipeError(
                f"train.resize = {self.resize} is smaller than train.image_size = "
                f"{self.image_size}, which is cut out of it; raise it, or remove it."
            )
        return self
