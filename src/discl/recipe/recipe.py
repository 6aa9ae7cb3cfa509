"""The whole tree, and what its sections must agree on.

Only `run_folder` and `stages` take a recipe. Other functions take the values that they use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from ..errors import RecipeError, join_lines, shorten, unknown
from ..levels import REAL, TEXT_ONLY, format_level
from ..models.resnet import ARCHITECTURES
from ..training.objectives import FLYP
from ..utils.plugins import read_piece
from ..utils.yaml_text import DUMPER
from .audit import Audit
from .compare import Compare, Evaluate
from .data import Data, Groups, Hard
from .filter import Filter, Retrieval
from .loop import Loop, check_loop
from .merge import merge
from .methods import RETRIEVED, Method
from .paths import PathOrName
from .pieces import check_pieces
from .pilot import Pilot
from .problems import explain
from .prompts import Prompts
from .spectrum import Spectrum
from .train import Train
from .types import Name, Strict

MOST_SLOTS = 65_536
"""Bound of a stated number; `auto` finds at most `spectrum.oom.AUTO_SLOTS`."""


def _slots(value: Any) -> Any:
    if value != "auto" and (not isinstance(value, int) or not 1 <= value <= MOST_SLOTS):
        raise RecipeError(
            f"got {shorten(value)}; write a whole number from 1 to {MOST_SLOTS}, or auto."
        )
    return value


class Runtime(Strict):
    """How a run is carried out; not part of its results.

    Bitwise equal results need the same device, threads and slots. Another number of slots changes
    pixels by at most one grey level in float32.
    """

    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,4})?)$")
    threads: int | None = Field(
        None, ge=1, le=4096, description="CPU threads of torch; null: the default of torch"
    )
    slots: Annotated[int | Literal["auto"], BeforeValidator(_slots)] = Field(
        "auto",
        description="images in one call of the UNet; auto: measured on a GPU, else chosen by image "
        "size",
    )
    compile: bool | None = Field(
        None,
        description="torch.compile for the generator; null: for long plans on an NVIDIA GPU; ids "
        "do not change",
    )
    loggers: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="training curves in addition to history.jsonl"
    )
    workers: int = Field(
        0,
        ge=0,
        le=1024,
        description="data-loading processes for images that do not fit in memory",
    )
    processes: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="processes that generate, or Ray workers; null: one per visible GPU",
    )
    store: PathOrName | None = Field(
        None,
        min_length=1,
        description="folder or fsspec URL for images and scores, such as s3://bucket/birds; null: "
        "the run folder",
    )
    shard_rows: int = Field(
        512, ge=1, le=10**6, description="images per shard; a killed run loses one shard at most"
    )


class Recipe(Strict):
    """Everything that determines a run, validated. `load_recipe` makes one from YAML.

    - `name`: name of the run.
    - `data`: the real images, their splits and long tail.
    - `groups`: class counts of many, medium and few.
    - `hard`: which training images get a spectrum.
    - `prompts`: the texts to generate from.
    - `spectrum`: generator, levels and seeds.
    - `filter`: CLIP and threshold.
    - `retrieval`: an archive whose images may take the place of synthetic ones.
    - `loop`: rounds of generation and training; default none.
    - `train`: classifier, epochs and optimizer.
    - `methods`: the methods to compare, by name.
    - `baseline`: the method that the report compares with; default the first.
    - `evaluate`: metrics.
    - `compare`: training seeds and search.
    - `pilot`: what `discl pilot` tries before the spectrum is made.
    - `audit`: what `discl audit` reports.
    - `runtime`: device, slots and stores; changes results by rounding only.

    Raises RecipeError for values that contradict each other.

    ```python
    import discl

    recipe = discl.load_recipe("fashion-lt")
    assert recipe.spectrum.levels == [0, 10, 30, 50]
    ```
    """

    LATER = ("loop", "audit")

    name: Name
    data: Data
    groups: Groups = Groups()
    hard: Hard = Hard()
    prompts: Prompts = Prompts()
    spectrum: Spectrum
    filter: Filter
    retrieval: Retrieval | None = None
    loop: Loop | None = Field(
        None, description="generate and train in rounds; null: generate everything, then train"
    )
    train: Train = Train()
    methods: dict[Name, Method] = Field(min_length=1, max_length=200)
    baseline: str | None = Field(
        None, description="method that the report compares with; null: the first"
    )
    evaluate: Evaluate = Evaluate()
    compare: Compare = Compare()
    pilot: Pilot = Pilot()
    audit: Audit = Audit()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        check_twins(self.methods)
        if self.baseline is not None and self.baseline not in self.methods:
            raise RecipeError(unknown("baseline", self.baseline, self.methods))
        for name in self.compare.tune.methods:
            if name not in self.methods:
                raise RecipeError(unknown("method in compare.tune.methods", name, self.methods))
        if self.filter.rule != "threshold" and self.spectrum.tries > 1:  # `wanted` needs tries
            raise RecipeError(
                "spectrum.tries redraws images below filter.threshold, and filter.rule "
                f"{self.filter.rule} drops others too; set it to 1."
            )
        if self.filter.has_own_thresholds:
            _check_own_thresholds(self)
        if self.spectrum.early_rejection is not None:
            _check_early_rejection(self.filter, self.methods)
        for name, method in self.methods.items():
            _check_fine_tuning(name, method, self.training(name))
            if method.images == RETRIEVED and self.retrieval is None:
                raise RecipeError(
                    f"methods.{name} trains on retrieved images, but the recipe names no archive; "
                    "add a section retrieval: {archive: FOLDER}."
                )
            needed = {"text-only": TEXT_ONLY, "fixed": method.level}.get(method.strategy)
            if needed is not None and needed != REAL and needed not in self.spectrum.levels:
                raise RecipeError(
                    f"methods.{name} trains on level {format_level(needed)}, which is not in "
                    f"spectrum.levels; add {needed} there."
                )
            if self.spectrum.makes_none and method.takes_synthetic:
                raise RecipeError(
                    f"methods.{name} trains on synthetic images (strategy {method.strategy}), and "
                    "spectrum.budget.images is 0; remove the budget, or use strategy real-only."
                )
            check_pieces(name, method, self.training(name), self.spectrum.levels)
        check_loop(self)
        return self

    @property
    def synthetic_scale(self) -> float:
        """The most synthetic images per hard image that a method asks for; 3 without any."""
        scales = [
            method.synthetic_scale
            for method in self.methods.values()
            if method.strategy != "real-only" and method.images != RETRIEVED
        ]
        return max(scales, default=3.0)

    def training(self, name: str) -> Train:
        """The section `train` of a method: the common one with the method's changes.

        Its curriculum epochs end where `finish` begins.

        - `name`: a key of `methods`.

        Raises RecipeError for a value out of range.
        """
        method, train = self.methods[name], self.train
        if method.train:
            try:
                train = Train.model_validate(merge(train.model_dump(mode="json"), method.train))
            except ValidationError as error:
                where = f"methods.{name}.train"
                problems = [explain(each, Train, where) for each in error.errors()]
                raise RecipeError(join_lines(problems)) from error
        if method.finish is None:
            return train
        before = train.epochs - method.finish.epochs
        if before < 1:
            raise RecipeError(
                f"methods.{name}.finish.epochs = {method.finish.epochs} leaves none of the "
                f"{train.epochs} epochs before them; lower it, or raise train.epochs."
            )
        return train.model_copy(update={"curriculum_epochs": min(train.curriculum_epochs, before)})

    def plain(self) -> dict[str, Any]:
        """The tree as plain values (dict, list, str, numbers), defaults included."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.dump(self.plain(), Dumper=DUMPER, sort_keys=False, allow_unicode=True)


def check_twins(names: Iterable[str]) -> None:
    """Raises RecipeError for names that are one folder on some file systems."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise RecipeError(
                f"methods '{other}' and '{name}' differ only in capitals, and their folders would "
                "be one on some file systems; rename one."
            )


def _check_own_thresholds(recipe: Recipe) -> None:
    """Raises RecipeError where a threshold of one level or class has no effect, or no image."""
    chosen, spectrum = recipe.filter, recipe.spectrum
    names = ("level_thresholds", "class_thresholds")
    key = f"filter.{next(name for name in names if getattr(chosen, name))}"
    for level in chosen.level_thresholds:
        if level not in spectrum.levels:
            raise RecipeError(
                f"filter.level_thresholds names level {format_level(level)}, which is not in "
                f"spectrum.levels; known: {', '.join(map(str, spectrum.levels))}."
            )
    rounds = recipe.loop.rounds if recipe.loop else 1
    causes = {
        "filter.rule: alia, which uses none": chosen.rule == "alia",
        "spectrum.tries above 1, which draws by filter.threshold alone": spectrum.tries > 1,
        "spectrum.early_rejection, which predicts filter.threshold": bool(spectrum.early_rejection),
        f"loop.rounds = {rounds}, which asks by filter.threshold": rounds > 1,
    }
    for cause, given in causes.items():
        if given:
            raise RecipeError(f"{key} cannot be used with {cause}; remove one of them.")


def _check_early_rejection(chosen: Filter, methods: dict[str, Method]) -> None:
    """Raises RecipeError where an image that is dropped on the way could be needed."""
    if chosen.rule == "alia":
        raise RecipeError(
            "spectrum.early_rejection predicts filter.threshold, which filter.rule alia does not "
            "use; remove one of them."
        )
    for name, method in methods.items():
        if method.threshold is not None and method.threshold < chosen.threshold:
            raise RecipeError(
                f"methods.{name}.threshold = {method.threshold:g} is below filter.threshold = "
                f"{chosen.threshold:g}, and spectrum.early_rejection drops such images on the way; "
                "lower filter.threshold, or remove early_rejection."
            )


def _check_fine_tuning(name: str, method: Method, train: Train) -> None:
    """Raises RecipeError where the network of a method cannot do what the method needs."""
    architecture, objective = train.model.architecture, method.loss.name
    if architecture != "clip" and (objective == FLYP or method.fine_tune == "zero-shot"):
        what = f"objective {FLYP}" if objective == FLYP else "fine_tune: zero-shot"
        raise RecipeError(
            f"methods.{name}: {what} needs a CLIP, but the architecture is {architecture}; "
            "set train.model.architecture: clip."
        )
    if objective == FLYP and method.fine_tune != "full":
        raise RecipeError(
            f"methods.{name}: objective {FLYP} trains both towers; use fine_tune: full "
            f"instead of {method.fine_tune}."
        )
    _check_head(name, method, train)
    if objective == FLYP and (train.mixup or train.cutmix):
        raise RecipeError(
            f"methods.{name}: mixup and cutmix cannot be used with objective {FLYP}, because "
            "an image has one text; set them to 0."
        )
    if method.fine_tune in {"linear-probe", "lp-ft", "light"} and (
        architecture in ARCHITECTURES or not train.model.pretrained
    ):
        raise RecipeError(
            f"methods.{name}: fine_tune: {method.fine_tune} needs a pretrained network, but "
            f"{architecture} starts from scratch."
        )
    last = method.finish.epochs if method.finish and method.finish.head_only else 0
    if method.fine_tune == "lp-ft" and train.epochs - last < 2:
        before = f" before those of finish.epochs = {last}" if last else ""
        raise RecipeError(
            f"methods.{name}: fine_tune: lp-ft needs at least two epochs{before}; got "
            f"{train.epochs - last}."
        )
    if method.fine_tune == "zero-shot" and method.strategy != "real-only":
        raise RecipeError(
            f"methods.{name}: fine_tune: zero-shot trains on nothing; remove strategy (got "
            f"{method.strategy})."
        )
    if method.fine_tune == "zero-shot" and method.system is not None:
        raise RecipeError(
            f"methods.{name}: fine_tune: zero-shot trains on nothing; remove system (got "
            f"{method.system})."
        )
    if (objective == "ldam") != (train.model.head == "cosine"):
        raise RecipeError(
            f"methods.{name}: objective ldam and head: cosine go together; write "
            "{objective: ldam, train: {model: {head: cosine}}}, with one of our residual networks."
        )


def _check_head(name: str, method: Method, train: Train) -> None:
    """Raises RecipeError where the head of a method cannot be trained or scaled by itself."""
    rebuilt = method.loss.name == FLYP
    texts = f"objective {FLYP} rebuilds the head from the texts of the classes"
    if method.finish is not None and method.fine_tune == "zero-shot":
        raise RecipeError(f"methods.{name}: fine_tune: zero-shot trains on nothing; remove finish.")
    if method.finish is not None and method.finish.head_only and rebuilt:
        raise RecipeError(f"methods.{name}.finish: {texts}; remove head_only.")
    light = method.fine_tune == "light" and train.model.light.head == "cosine"
    if light and method.system is not None and read_piece("system", method.system)[0] == "ldmlr":
        raise RecipeError(
            f"methods.{name}: system ldmlr trains a linear head again, and train.model.light.head "
            "is cosine; set it to linear, or remove system."
        )
    if method.tau_normalisation is None:
        return
    if rebuilt or light or method.fine_tune == "zero-shot" or train.model.head == "cosine":
        reason = texts if rebuilt else "the class vectors of this head have one length already"
        raise RecipeError(
            f"methods.{name}.tau_normalisation = {method.tau_normalisation:g} changes nothing: "
            f"{reason}; remove it."
        )
