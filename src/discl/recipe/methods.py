"""Section `methods`: strategy, mixture and system of each row of the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from ..baselines import make_system
from ..curriculum.strategies import Strategy, find_strategy, make_strategy
from ..errors import RecipeError, arguments_named, shorten
from ..levels import REAL
from ..mixtures import LONG_FORM, Mixture, Sampling
from ..training.objectives import Objective, read_objective
from ..utils.plugins import check_address, is_address, read_piece
from .types import Level, Strict

if TYPE_CHECKING:
    from .train import Train

RETRIEVED = "retrieved"
"""The `images` of a method that takes those of an archive."""


def _system(value: Any) -> Any:
    if value is not None:
        name, _ = read_piece("system", value)
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


def _weight(value: Any) -> Any:
    if value is None:
        return value
    is_pair = isinstance(value, list | tuple)
    values = list(value) if is_pair else [value]
    allowed = all(
        isinstance(each, int | float) and not isinstance(each, bool) and 0 <= each <= 100
        for each in values
    )
    if not allowed or (is_pair and len(values) != 2):
        raise RecipeError(
            f"got {shorten(value)}; write a number from 0 to 100, or two, [first, last], between "
            "which the weight goes linearly over training."
        )
    return value


class Adjustment(Strict):
    """Post-hoc logit adjustment z − τ log π, with π the frequencies of the classes."""

    prior: Literal["real", "effective"] = Field(
        "effective",
        description="class frequencies of the real images, or as drawn in training",
    )
    tau: float = Field(1.0, ge=0, le=100)


class Finish(Strict):
    """The last epochs of a method, on real images only.

    With `head_only` and `new_head` this is classifier re-training, cRT (arXiv 1910.09217).
    """

    epochs: int = Field(ge=1, le=100_000, description="how many of train.epochs come last")
    head_only: bool = Field(
        False, description="trains the head only, and draws every class equally often"
    )
    new_head: bool = Field(
        False, description="with head_only: the head begins again as at the start of training"
    )
    lr: float | None = Field(
        None,
        gt=0,
        le=10_000,
        description="with head_only: learning rate, which falls to 0 as a cosine; null: "
        "train.optimizer.lr",
    )

    @model_validator(mode="after")
    def _of_the_head(self) -> Finish:
        if not self.head_only and (self.new_head or self.lr is not None):
            key = "new_head" if self.new_head else "lr"
            raise RecipeError(
                f"finish.{key} is for epochs that train the head only; add head_only: true, or "
                f"remove {key}."
            )
        return self


class Method(Strict):
    """One row of the table: the images that the classifier is trained on, and its loss."""

    LATER = ("mixture", "images", "finish", "tau_normalisation", "synthetic_weight")

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
    fine_tune: Literal["full", "linear-probe", "lp-ft", "light", "zero-shot"] = Field(
        "full",
        description="trained part of the network; lp-ft: the head first, then all; light: adapters "
        "and the head, see train.model.light; zero-shot: nothing",
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
    finish: Finish | None = Field(
        None,
        description="the last epochs: real images only, or the head alone on classes drawn evenly "
        "(cRT); null: none",
    )
    tau_normalisation: float | None = Field(
        None,
        ge=0,
        le=10,
        description="τ of the row METHOD+tau; null: that of evaluate.tau_normalisation with the "
        "best mean class accuracy on validation",
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
    synthetic_weight: Annotated[float | tuple[float, float] | None, BeforeValidator(_weight)] = (
        Field(
            None,
            description="weight of a synthetic or retrieved image in the loss, where a real one "
            "has 1: a number, or [first, last] to go linearly from one to the other over training; "
            "null: 1",
        )
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

    def make_strategy(
        self, train: Train, levels: Sequence[int], allow_plugins: bool = False
    ) -> Strategy:
        """The method's strategy.

        - `train`: the method's section `train`.
        - `levels`: the levels of the spectrum.
        - `allow_plugins`: whether `module:attribute` may be imported.

        Raises RecipeError where a strategy of these epochs and levels is impossible.
        """
        with arguments_named(curriculum_epochs="train.curriculum_epochs"):
            return make_strategy(
                self.strategy,
                levels=levels,
                curriculum_epochs=train.curriculum_epochs,
                level=self.level,
                seed=train.seed,
                allow_plugins=allow_plugins,
            )

    @property
    def takes_synthetic(self) -> bool:
        """Whether training draws synthetic images; level 100 holds real ones."""
        return self.strategy != "real-only" and self.level != REAL

    @property
    def states_mixture(self) -> bool:
        """Whether the recipe states how classes are mixed, by name or in the long form."""
        return (self.mixture, self.undersample, self.sampling) != (None, None, "instance")

    def _unwritten(self) -> set[str]:
        return super()._unwritten() | set(LONG_FORM if self.mixture is not None else ())

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
    def _weight_of_something(self) -> Method:
        if self.synthetic_weight is not None and self.strategy == "real-only":
            raise RecipeError(
                f"synthetic_weight = {self.synthetic_weight} weighs synthetic images, and strategy "
                "real-only has none; remove it, or choose a strategy with a spectrum."
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
