"""The recipe: one validated tree of everything that determines a run, read from and written to YAML.

Functions elsewhere take the values that they use, never a whole recipe; only `workspace.py` and `stages/` know this tree.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..assets import published_figures
from ..curriculum.augmentation import AUGMENTATIONS
from ..curriculum.models import ARCHITECTURES, FROM_CHECKPOINT
from ..curriculum.objectives import FLYP, Objective, make_objective
from ..curriculum.strategies import MEASURING, STRATEGIES, make_strategy
from ..data.readers import READERS
from ..errors import RecipeError, unknown
from ..levels import REAL, GuidanceLevel, check_levels
from ..prompts import fill


def _level(value: Any) -> GuidanceLevel:
    return value if isinstance(value, GuidanceLevel) else GuidanceLevel(value)


def _one_of(kind: str, known: Any) -> BeforeValidator:
    def check(value: Any) -> Any:
        if not isinstance(value, str) or value not in known:
            raise RecipeError(unknown(kind, str(value), known))
        return value

    return BeforeValidator(check)


def _class_order(value: Any) -> Any:
    """Names that YAML takes for numbers (the classes '0' … '9') are texts again."""
    if isinstance(value, list):
        return [str(name) for name in value]
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise RecipeError(f"a list of class names (head first), a whole number (a seed) or null is expected; got {value!r}.")


def _template(value: str) -> str:
    fill(value, "")
    return value


def _published(value: str) -> str:
    published_figures(value)
    return value


def _objective(value: Any) -> Any:
    make_objective(value)
    return value


Level = Annotated[GuidanceLevel, BeforeValidator(_level), PlainSerializer(lambda level: level.percent)]
Share = Annotated[float, Field(ge=0, lt=1)]
Template = Annotated[str, AfterValidator(_template)]


class Strict(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `on` and `yes` as true, which pydantic would take for the number 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in (bool, bool | None):
            raise RecipeError(f"got the truth value {value} (so YAML reads yes, no, on and off); put it in quotes if a text is meant.")
        return value


class LongTail(Strict):
    """Exponential profile n_c = ⌊n_max · IR^(−c/(C−1))⌋ over the classes in `class_order`, head first."""

    n_max: int = Field(ge=1)
    imbalance_ratio: float = Field(ge=1)
    class_order: Annotated[list[str] | int | None, BeforeValidator(_class_order)] = Field(
        None, description="names, head first; a number shuffles with that seed; null keeps the order"
    )
    seed: int = 0


class OwnSplit(Strict):
    """Shares of a data set that comes without splits; a group (camera, burst) never straddles."""

    validation: Share = 0.1
    test: Share = 0.2
    seed: int = 0

    @model_validator(mode="after")
    def _training_is_left(self) -> OwnSplit:
        if self.validation + self.test >= 1:
            raise RecipeError(f"validation + test = {self.validation + self.test:g} leaves no image for training; keep the sum below 1.")
        return self


class Data(Strict):
    """Where the real images are."""

    root: str = Field(description="folder of class folders, folder of Parquet files, name of a hub data set, or embedded:fashion-mnist")
    format: Annotated[str, _one_of("format", ("auto", *READERS))] = "auto"
    files: dict[str, str] = Field(default_factory=dict, description="their split: its list, for formats that have lists")
    splits: dict[Literal["train", "validation", "test", "validation-ood", "test-ood"], str] = Field(
        default_factory=dict, description="our split: its name in the data"
    )
    columns: dict[Literal["id", "image", "label", "split", "domain", "group"], str] = Field(
        default_factory=dict, description="our column: theirs"
    )
    own_split: OwnSplit = OwnSplit()
    long_tail: LongTail | None = None
    unreadable: Literal["error", "skip"] = "error"
    overlap: Literal["error", "keep"] = Field(
        "error", description="pictures that lie in two splits: stop, or keep them as published benchmarks do (CIFAR-100 has some)"
    )


class Groups(Strict):
    """Bounds of the report's groups: many has more training images than `many`, few has fewer than `few`."""

    many: int = Field(100, ge=1)
    few: int = Field(20, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Groups:
        if self.few > self.many + 1:
            raise RecipeError(f"groups.few = {self.few} lies above groups.many = {self.many}; a class would be in two groups.")
        return self


class Hard(Strict):
    """Which training images get a spectrum."""

    rule: Literal["tail", "probability"] = "tail"
    fewer_than: int = Field(20, ge=1, description="tail: classes with fewer training images than this")
    below: float = Field(0.5, gt=0, le=1, description="probability: images whose true class gets less than this")
    folds: int = Field(3, ge=2, description="probability: no image is judged by a classifier that saw it")
    epochs: int = Field(10, ge=1, description="probability: epochs of each fold's classifier")


class Prompts(Strict):
    """Texts to generate from; one is drawn per (source, seed, try) and shared by the levels."""

    templates: list[Template] = Field(["a photo of {class}"], min_length=1)
    phrases: str | None = Field(None, description="YAML file {class: [texts]}, or embedded:NAME; used instead of the templates")
    negative: str = ""
    names: dict[str, str] = Field(default_factory=dict, description="class name: the name to use in texts")


class Spectrum(Strict):
    """Phase 1: what is generated for each hard image."""

    checkpoint: str = Field(description="folder in diffusers' format, hub name, or embedded:fashion-mnist")
    levels: list[Level] = Field(min_length=1)
    seeds: int = Field(8, ge=1, description="synthetic images per source and level")
    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(10.0, ge=1, description="s = 1 + w of eq. 2, as diffusers counts it")
    size: int | None = Field(None, ge=8, description="pixels a side; null: the checkpoint's own")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    encoding: Literal["webp-lossless", "webp", "jpeg", "png"] = "webp-lossless"

    @model_validator(mode="after")
    def _levels_are_generated(self) -> Spectrum:
        if len(set(self.levels)) != len(self.levels):
            raise RecipeError(f"spectrum.levels names a level twice: {[level.percent for level in self.levels]}.")
        check_levels(self.levels, self.num_inference_steps)
        return self


class Filter(Strict):
    """CLIP filter: images below the threshold (raw cosine) are dropped before training."""

    checkpoint: str = Field(description="CLIP folder in transformers' format, hub name, or embedded:fashion-mnist")
    template: Template = "a photo of {class}"
    threshold: float = Field(0.3, ge=-1, le=1)


class Model(Strict):
    """The classifier: one of our residual networks, or whatever a checkpoint of transformers, timm or CLIP is."""

    architecture: Annotated[str, _one_of("architecture", [*ARCHITECTURES, *FROM_CHECKPOINT])] = "resnet10"
    checkpoint: str | None = Field(None, description="transformers, timm, clip: folder or hub name")
    pretrained: bool = Field(True, description="begin with the checkpoint's weights, or take only its architecture")
    templates: list[Template] = Field(["a photo of {class}."], min_length=1, description="clip: prompts of each class")
    head: Literal["linear", "cosine"] = "linear"
    stem: Literal["7x7", "3x3"] = "7x7"
    width: int | None = Field(None, ge=4, description="channels of the first stage; null: the architecture's own")

    @model_validator(mode="after")
    def _checkpoint_where_one_is_needed(self) -> Model:
        needs = self.architecture in FROM_CHECKPOINT
        if needs and self.checkpoint is None:
            raise RecipeError(f"architecture {self.architecture} takes its network from a checkpoint; name one in train.model.checkpoint.")
        if not needs and self.checkpoint is not None:
            raise RecipeError(
                f"architecture {self.architecture} is built from scratch; leave out checkpoint, or name transformers, timm or clip."
            )
        if needs and (self.head != "linear" or self.width is not None):
            raise RecipeError(f"head: cosine and width are for our own residual networks; architecture {self.architecture} has its own.")
        if not self.pretrained and self.architecture == "clip":
            raise RecipeError("architecture clip needs its pretrained weights, for its head is made of its texts; leave out pretrained.")
        return self


class Optimizer(Strict):
    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    milestones: list[float] = Field([0.8, 0.9], description="steps: shares of the epochs after which lr is divided by 100")
    warm_up_epochs: int = Field(0, ge=0)
    warm_up_steps: int | None = Field(None, ge=1, description="warm-up in updates; used instead of warm_up_epochs")
    decay_vectors: bool | None = Field(
        None, description="weight decay on norms, biases and scales too; null: for residual networks only, as open_clip does"
    )


class Train(Strict):
    """Phase 2: what all methods share, so that they are compared at equal numbers of updates."""

    epochs: int = Field(65, ge=1)
    curriculum_epochs: int = Field(60, ge=0, description="E_CL; from then on only real images")
    batch_size: int = Field(128, ge=1)
    steps_per_epoch: int | None = Field(None, ge=1, description="updates in an epoch; null: training images / batch_size")
    image_size: int = Field(224, ge=8)
    resize: int | None = Field(None, ge=8, description="square that images are brought to before augmentation; null: image_size")
    augment: list[Annotated[str, _one_of("augmentation", AUGMENTATIONS)]] = ["random-resized-crop", "flip"]
    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = Field(
        (0.08, 1.0), description="shares of the area that random-resized-crop takes; FLYP: [0.9, 1.0]"
    )
    mixup: float = Field(0.0, ge=0, description="α of Beta(α, α); 0 for off")
    cutmix: float = Field(0.0, ge=0, description="α of Beta(α, α); 0 for off")
    accumulate: int = Field(1, ge=1, description="parts of a batch whose gradients are averaged, to save memory")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of a moving average of the weights, which is then evaluated and saved")
    head_epochs: int | None = Field(None, ge=1, description="lp-ft: first epochs, of the head alone; null: a quarter of all")
    head_lr: float = Field(1e-3, gt=0, description="lp-ft: learning rate of those")
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    select: Literal["last", "validation"] = "last"
    seed: int = 0

    @model_validator(mode="after")
    def _epochs(self) -> Train:
        if self.curriculum_epochs > self.epochs:
            raise RecipeError(f"train.curriculum_epochs = {self.curriculum_epochs} exceeds train.epochs = {self.epochs}.")
        if self.optimizer.warm_up_epochs >= self.epochs:
            raise RecipeError(f"train.optimizer.warm_up_epochs = {self.optimizer.warm_up_epochs} leaves none of the {self.epochs} epochs.")
        if self.crop_scale[0] > self.crop_scale[1]:
            raise RecipeError(f"train.crop_scale = {list(self.crop_scale)} names the greater share first.")
        if self.batch_size % self.accumulate:
            raise RecipeError(f"train.batch_size = {self.batch_size} cannot be divided evenly into accumulate = {self.accumulate} parts.")
        if self.head_epochs is not None and self.head_epochs >= self.epochs:
            raise RecipeError(f"train.head_epochs = {self.head_epochs} leaves none of the {self.epochs} epochs for the whole network.")
        if self.resize is not None and self.resize < self.image_size:
            raise RecipeError(
                f"train.resize = {self.resize} is smaller than train.image_size = {self.image_size}, which is cut out of it; "
                "raise it, or leave it out."
            )
        return self


class Method(Strict):
    """One row of the table: what the classifier is trained on, with which loss."""

    strategy: Annotated[str, _one_of("strategy", STRATEGIES)] = "real-only"
    level: Level | None = Field(None, description="only for strategy fixed")
    objective: Annotated[str | dict[str, str | float], BeforeValidator(_objective)] = Field(
        "cross-entropy", description="a name, or a mapping with parameters such as {name: focal, gamma: 2}"
    )
    fine_tune: Literal["full", "linear-probe", "lp-ft", "zero-shot"] = Field(
        "full", description="what is trained; lp-ft: the head first, then all; zero-shot: nothing"
    )
    sampling: Literal["instance", "square-root", "class-balanced"] = Field(
        "instance", description="how often an epoch draws a class: as mixed, ∝ √ of that, or all classes equally"
    )
    train: dict[str, Any] = Field(default_factory=dict, description="laid over the section train for this method alone")
    prior: Literal["real", "effective"] = Field(
        "real", description="class counts of balanced-softmax: real images, or real + synthetic as drawn"
    )
    undersample: bool | None = Field(
        None, description="keep the tail's share of an epoch at its share of classes; null: where synthetic images are used"
    )
    synthetic_scale: float = Field(3.0, ge=0, description="synthetic images in an epoch per real tail image")
    missing: Literal["error", "nearest"] = Field(
        "error", description="a class without any kept image at an epoch's level: stop, or take its nearest level"
    )
    guidance_images: int | None = Field(
        None, ge=1, description="|V|, images that progress is measured on; null: 2,000, or a fifth of those kept if that is less"
    )
    probe_samples: int | None = Field(
        None, ge=1, description="|D|, real samples of an epoch's probe; null: 30,000, or a quarter of an epoch if that is less"
    )
    shortage: Literal["repeat", "cap"] = Field("repeat", description="where fewer images were kept than the scale asks for")

    @property
    def loss(self) -> Objective:
        """The objective with its parameters."""
        return make_objective(self.objective)

    @model_validator(mode="after")
    def _level_goes_with_fixed(self) -> Method:
        if (self.strategy == "fixed") != (self.level is not None):
            raise RecipeError("strategy 'fixed' and the key 'level' go together, for example {strategy: fixed, level: 50}.")
        if self.strategy in MEASURING and self.prior == "effective":
            raise RecipeError(
                f"prior 'effective' needs a schedule that is known beforehand, which strategy '{self.strategy}' has not; use real."
            )
        return self


class Evaluate(Strict):
    worst_k: list[Annotated[int, Field(ge=1)]] = [1, 3]
    logit_adjustment: list[float] = Field(
        [1.0], min_length=1, description="strengths τ of post-hoc logit adjustment; chosen on validation where there are several"
    )
    weight_ensembling: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        description="clip: shares α of the tuned weights to choose from on validation; empty for no row METHOD+we",
    )


class Compare(Strict):
    """`discl compare`: methods × seeds, beside the paper's figures."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1)
    published: Annotated[str, AfterValidator(_published)] | None = Field(
        None, description="a table of the paper, as assets/published.yaml names it"
    )
    rows: dict[str, str] = Field(default_factory=dict, description="our row: its name in that table, where they differ")


class Runtime(Strict):
    """How a run is carried out, not what is asked for. Bitwise the same results need the same device, threads and slots."""

    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; null: torch's own choice")
    slots: int = Field(64, ge=1, description="images denoised in one UNet call")
    loggers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list, description="training curves beside history.jsonl")
    workers: int = Field(0, ge=0, description="data-loading processes, where the images do not fit in memory")
    shard_rows: int = Field(512, ge=1, description="images per shard, and at most lost when killed")


class Recipe(Strict):
    """Everything that determines a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: Data
    groups: Groups = Groups()
    hard: Hard = Hard()
    prompts: Prompts = Prompts()
    spectrum: Spectrum
    filter: Filter
    train: Train = Train()
    methods: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], Method] = Field(min_length=1)
    baseline: str | None = Field(None, description="the method that the report compares with; null: the first")
    evaluate: Evaluate = Evaluate()
    compare: Compare = Compare()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.baseline is not None and self.baseline not in self.methods:
            raise RecipeError(unknown("baseline", self.baseline, self.methods))
        for name, method in self.methods.items():
            _check_fine_tuning(name, method, self.training(name))
            needed = {"text-only": GuidanceLevel(0), "fixed": method.level}.get(method.strategy)
            if needed is not None and needed != REAL and needed not in self.spectrum.levels:
                raise RecipeError(f"methods.{name} trains on level {needed}, which spectrum.levels lacks; add {needed.percent} there.")
            make_strategy(
                method.strategy, levels=self.spectrum.levels, curriculum_epochs=self.train.curriculum_epochs, level=method.level
            )  # raises what would otherwise show only after the spectrum is made
        return self

    def training(self, name: str) -> Train:
        """The section `train` with what a method lays over it. Raises RecipeError where that is out of range."""
        if not self.methods[name].train:
            return self.train
        try:
            return Train.model_validate(_overlaid(self.train.model_dump(mode="json"), self.methods[name].train))
        except ValidationError as error:
            told = [f"methods.{name}.train.{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
            raise RecipeError("\n".join(told)) from error

    def plain(self) -> dict[str, Any]:
        """The tree as plain values (dict, list, str, numbers), defaults filled in."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)


def _overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _overlaid(below[key], value) for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return {**below, **above, **both}


def _check_fine_tuning(name: str, method: Method, train: Train) -> None:
    """Raises RecipeError where a method asks of its network what that cannot do."""
    architecture, objective = train.model.architecture, method.loss.name
    if architecture != "clip" and (objective == FLYP or method.fine_tune == "zero-shot"):
        what = f"objective {FLYP}" if objective == FLYP else "fine_tune: zero-shot"
        raise RecipeError(
            f"methods.{name}: {what} needs a CLIP, but the architecture is {architecture}; set train.model.architecture: clip."
        )
    if objective == FLYP and method.fine_tune != "full":
        raise RecipeError(f"methods.{name}: objective {FLYP} trains both towers; use fine_tune: full instead of {method.fine_tune}.")
    if objective == FLYP and (train.mixup or train.cutmix):
        raise RecipeError(f"methods.{name}: mixup and cutmix have no meaning for objective {FLYP}, an image has one text; set them to 0.")
    if method.fine_tune in {"linear-probe", "lp-ft"} and (architecture in ARCHITECTURES or not train.model.pretrained):
        raise RecipeError(
            f"methods.{name}: fine_tune: {method.fine_tune} needs a pretrained network, but {architecture} starts from scratch."
        )
    if method.fine_tune == "lp-ft" and train.epochs < 2:
        raise RecipeError(f"methods.{name}: fine_tune: lp-ft needs at least two epochs; got {train.epochs}.")
    if method.fine_tune == "zero-shot" and method.strategy != "real-only":
        raise RecipeError(f"methods.{name}: fine_tune: zero-shot trains on nothing; leave out strategy (got {method.strategy}).")
    if (objective == "ldam") != (train.model.head == "cosine"):
        raise RecipeError(
            f"methods.{name}: objective ldam and head: cosine go together; write "
            "{objective: ldam, train: {model: {head: cosine}}}, with one of our residual networks."
        )
