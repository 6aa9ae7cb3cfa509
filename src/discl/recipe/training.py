"""Sections of phase 2: classifier, training, methods, evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ..assets import published_figures
from ..baselines import make_system, read_system
from ..curriculum.strategies import find_strategy
from ..errors import RecipeError
from ..levels import REAL
from ..mixtures import LONG_FORM, Mixture, Sampling
from ..models.classifier import ARCHITECTURES, FROM_CHECKPOINT
from ..training.augmentation import AUGMENTATIONS
from ..training.objectives import Objective, read_objective
from ..utils.plugins import check_address, is_address
from .paths import PathOrName
from .types import Level, Seed, Strict, Template, one_of, without_default

Channel = Annotated[float, Field(ge=-1, le=1)]
Channels = tuple[float, float, float]
RETRIEVED = "retrieved"
"""The `images` of a method that takes those of an archive."""


def _published(value: str) -> str:
    published_figures(value)
    return value


def _system(value: Any) -> Any:
    if value is not None:
        name, _ = read_system(value)
        if is_address(name):
            check_address("system", name)
        else:
            make_system(value)
    return value


def _objective(value: Any) -> Any:
    name = read_objective(value).name
    if is_address(name):
        check_address("objective", name)
    return value


def _strategy(value: Any) -> Any:
    if is_address(value):
        check_address("strategy", value)
    else:
        find_strategy(str(value))
    return value


def _positive(value: Channels) -> Channels:
    if min(value) <= 0 or max(value) > 10:
        raise RecipeError(
            f"got {list(value)}; standard deviations of pixels in [0, 1] are greater than 0 and at "
            "most 10."
        )
    return value


class Model(Strict):
    """The classifier: a residual network, or a checkpoint of transformers, timm or CLIP."""

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
        return self


class Optimizer(Strict):
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

    @model_serializer(mode="wrap")
    def _plain(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_default(write(self), factor=0.01)


class Train(Strict):
    """Phase 2: training settings of all methods, so that all have the same number of updates."""

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

    @model_serializer(mode="wrap")
    def _plain(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_default(write(self), mean=None, std=None, resize_mode="square")

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


class Adjustment(Strict):
    """Post-hoc logit adjustment z − τ log π, with π the frequencies of the classes."""

    prior: Literal["real", "effective"] = Field(
        "effective",
        description="class frequencies of the real images, or as drawn in training",
    )
    tau: float = Field(1.0, ge=0, le=100)


class Method(Strict):
    """One row of the table: the images that the classifier is trained on, and its loss."""

    strategy: Annotated[str, BeforeValidator(_strategy)] = Field(
        "real-only", description="a name, or module:attribute for a custom one (--allow-plugins)"
    )
    level: Level | None = Field(None, description="only for strategy fixed")
    images: Literal["synthetic", "retrieved"] = Field(
        "synthetic",
        description="retrieved: real images of retrieval.archive in the place of synthetic ones, "
        "at level 100",
    )
    objective: Annotated[str | dict[str, str | float], BeforeValidator(_objective)] = Field(
        "cross-entropy",
        description="a name, a mapping such as {name: focal, gamma: 2}, or module:attribute "
        "(--allow-plugins)",
    )
    system: Annotated[str | dict[str, Any] | None, BeforeValidator(_system)] = Field(
        None,
        description="another system: cuda, docl, ldmlr, a mapping such as {name: cuda, threshold: "
        "0.4}, or module:Class (--allow-plugins)",
    )
    fine_tune: Literal["full", "linear-probe", "lp-ft", "zero-shot"] = Field(
        "full",
        description="trained part of the network; lp-ft: the head first, then all; zero-shot: "
        "nothing",
    )
    mixture: Mixture | None = Field(
        None,
        description="how often an epoch draws each class: undersampled (as in the paper, the "
        "default with synthetic images of a tail), class-balanced, square-root, or all (the "
        "default of real-only)",
    )
    sampling: Sampling = Field(
        "instance",
        description="long form of mixture, with undersample: class frequencies as they are, ∝ "
        "their square roots, or all equal",
    )
    threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="minimum clip_similarity of this method's images; null: all that the filter "
        "kept",
    )
    train: dict[str, Any] = Field(
        default_factory=dict,
        description="changes of the section train for this method; a null restores the default",
    )
    adjustment: Adjustment | None = Field(
        None,
        description="of the row METHOD+la; null: the best on validation, or without validation "
        "images prior effective and the τ closest to 1",
    )
    prior: Literal["real", "effective"] = Field(
        "real",
        description="class counts of balanced-softmax: real images, or real and synthetic as drawn",
    )
    undersample: bool | None = Field(
        None,
        description="long form of mixture, with sampling: keeps the tail's fraction of an epoch "
        "at its fraction of classes; null: with synthetic images only",
    )
    synthetic_scale: float = Field(
        3.0, ge=0, le=10_000, description="synthetic images in an epoch per real tail image"
    )
    missing: Literal["error", "nearest"] = Field(
        "error",
        description="a class without kept images at the level of an epoch: stop, or use its "
        "nearest level",
    )
    guidance_images: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="|V|, hard images held out of training, each with a synthetic image at every "
        "level to measure progress on; null: 2,000, or a fifth of them if that is less",
    )
    probe_samples: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="|D|, real samples of the probe of an epoch; null: 30,000, or a quarter of an "
        "epoch if that is less",
    )
    shortage: Literal["repeat", "cap"] = Field(
        "repeat",
        description="if fewer images were kept than synthetic_scale needs: repeat some, or use "
        "fewer",
    )

    @property
    def loss(self) -> Objective:
        """The objective with its parameters, or `module:attribute` as its name."""
        return read_objective(self.objective)

    @property
    def states_mixture(self) -> bool:
        """Whether the recipe states how classes are mixed, by name or in the long form."""
        return (self.mixture, self.undersample, self.sampling) != (None, None, "instance")

    @model_serializer(mode="wrap")
    def _plain(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain = without_default(write(self), mixture=None, images="synthetic")
        if self.mixture is not None:
            plain = {key: value for key, value in plain.items() if key not in LONG_FORM}
        return plain

    @model_validator(mode="before")
    @classmethod
    def _null_restores_sampling(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("sampling", "") is None:
            return {key: each for key, each in value.items() if key != "sampling"}
        return value

    @model_validator(mode="after")
    def _one_form_of_the_mixture(self) -> Method:
        defaults = {key: Method.model_fields[key].default for key in LONG_FORM}
        stated = [key for key in LONG_FORM if getattr(self, key) != defaults[key]]
        if self.mixture is not None and stated:
            raise RecipeError(
                f"'mixture' (got {self.mixture}) and '{stated[0]}' state the same; remove one of "
                f"them (a null removes what a base states, as in {stated[0]}: null)."
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _retrieved_at_level_100(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("images") == RETRIEVED:
            return {"strategy": "fixed", "level": REAL, **value}
        return value

    @model_validator(mode="after")
    def _retrieved_images_are_real(self) -> Method:
        if self.images == RETRIEVED and (self.strategy, self.level) != ("fixed", REAL):
            raise RecipeError(
                f"images: {RETRIEVED} are real ones, which are at level {REAL}; remove strategy "
                f"and level (got {self.strategy}, {self.level})."
            )
        return self

    @model_validator(mode="after")
    def _level_goes_with_fixed(self) -> Method:
        if (self.strategy == "fixed") != (self.level is not None):
            raise RecipeError(
                "strategy 'fixed' and the key 'level' go together, for example {strategy: fixed, "
                "level: 50}."
            )
        return self


class Evaluate(Strict):
    worst_k: list[Annotated[int, Field(ge=1, le=10**8)]] = Field([1, 3], max_length=100)
    logit_adjustment: list[Annotated[float, Field(ge=-100, le=100)]] = Field(
        [1.0],
        min_length=1,
        max_length=1000,
        description="candidate strengths τ of post-hoc logit adjustment, chosen on validation",
    )
    weight_ensembling: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        description="clip: candidate fractions α of the tuned weights, chosen on validation; "
        "empty: no row METHOD+we",
    )


Space = dict[str, Annotated[list[Any], Field(min_length=1)]]
"""Keys of a method, such as train.optimizer.lr, and the values to try."""


class Tune(Strict):
    """`discl compare --tune`: a search on validation, with equally many trials per method."""

    trials: int = Field(
        3, ge=1, le=10_000, description="trials per method; the first is the unchanged method"
    )
    space: Space = Field(
        default_factory=dict,
        description="key of a method, such as train.optimizer.lr: values to try for all methods; "
        "mixture: for those that state none; empty: lr / 3 and 3 lr",
    )
    methods: dict[str, Space] = Field(
        default_factory=dict,
        description="method: its further keys and values, such as {ce-cuda: {system.threshold: "
        "[0.4, 0.6]}}",
    )
    hold_out: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="fraction of the training images for scoring trials; null: the validation "
        "split, or a fifth where it does not exist",
    )
    metric: Literal["balanced_accuracy", "accuracy", "macro_f1"] = "balanced_accuracy"
    seed: Seed = 0
    train: dict[str, Any] = Field(
        default_factory=dict,
        description="changes of the section train for trials, such as fewer epochs",
    )


class Compare(Strict):
    """`discl compare`: methods × seeds, with the published figures."""

    seeds: list[Seed] = Field([0, 1, 2], min_length=1, max_length=1000)
    published: Annotated[str, AfterValidator(_published)] | None = Field(
        None, description="a table of the paper, as named in assets/published.yaml"
    )
    rows: dict[str, str] = Field(
        default_factory=dict, description="our row: its name in that table, if different"
    )
    tune: Tune = Tune()
