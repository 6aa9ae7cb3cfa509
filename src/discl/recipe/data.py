"""Sections about real images: their source, their splits, and which are hard."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from ..data.readers import READERS
from ..errors import RecipeError, shorten
from .paths import PathOrName
from .types import LARGEST_SEED, Seed, Strict, one_of

Fraction = Annotated[float, Field(ge=0, lt=1)]


def _class_order(value: Any) -> Any:
    """Class names as texts, also those that YAML takes for numbers ('0' … '9')."""
    if isinstance(value, list):
        return [str(name) for name in value]
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        if value is not None and not 0 <= value <= LARGEST_SEED:
            raise RecipeError(f"the seed {value} is out of range; allowed: 0 to {LARGEST_SEED}.")
        return value
    raise RecipeError(
        "a list of class names (head first), a whole number (a seed) or null is expected; got "
        f"{shorten(value)}."
    )


def _class_names(value: Any) -> Any:
    """As `_class_order`, for a list only."""
    if not isinstance(value, list):
        raise RecipeError(
            f"a list of class names is expected, such as [empty]; got {shorten(value)}."
        )
    return [str(name) for name in value]


class LongTail(Strict):
    """Exponential long tail: n_c = ⌊n_max · IR^(−c/(C−1))⌋ images of class c, in `class_order`."""

    n_max: int = Field(ge=1, le=10**8)
    imbalance_ratio: float = Field(ge=1, le=10**8)
    class_order: Annotated[list[str] | int | None, BeforeValidator(_class_order)] = Field(
        None,
        description="class names, head first; a number: shuffled with that seed; null: the order "
        "of the data",
    )
    seed: Seed = 0
    index: PathOrName | None = Field(
        None,
        description="file of content digests, or embedded:cifar100; images are taken in this "
        "order, not drawn by the seed",
    )


class OwnSplit(Strict):
    """Split fractions for a data set without splits. A group (camera, burst) is never divided."""

    validation: Fraction = 0.1
    test: Fraction = 0.2
    seed: Seed = 0

    @model_validator(mode="after")
    def _training_is_left(self) -> OwnSplit:
        if self.validation + self.test >= 1:
            raise RecipeError(
                f"validation + test = {self.validation + self.test:g} leaves no image for "
                "training; keep the sum below 1."
            )
        return self


class Cameras(Strict):
    """Simulates camera traps. Each image is degraded by its camera, and the camera is the domain.

    The training images give pretraining (not read), train and validation. The test images give test
    and, with other cameras, test-ood. Parts and degradation depend only on the seed and image ids.
    """

    seed: Seed = 0
    seen: int = Field(12, ge=1, le=10_000, description="cameras of train, validation and test")
    unseen: int = Field(6, ge=1, le=10_000, description="cameras of test-ood")
    clean: float = Field(0.2, ge=0, le=1, description="fraction of images that are not degraded")
    pretraining: Fraction = Field(
        0.6, description="fraction of the training images that only generator and CLIP may see"
    )
    validation: int = Field(2000, ge=1, le=10**8, description="images of validation")
    most: dict[
        Literal["train", "validation", "test", "test-ood"], Annotated[int, Field(ge=1, le=10**8)]
    ] = Field(default_factory=dict, description="split: its maximum number of images")


class Data(Strict):
    """The source of the real images."""

    LATER = ("bits",)

    root: PathOrName = Field(
        description="folder of class folders, folder of Parquet files, a list, a hub data set "
        "(owner/name, owner/name:config@revision), or embedded:fashion-mnist"
    )
    format: Annotated[str, one_of("format", ("auto", *READERS))] = "auto"
    files: dict[str, PathOrName] = Field(
        default_factory=dict,
        description="split of the data: its list file, for formats with lists; in root, or beside "
        "the recipe",
    )
    splits: dict[
        Literal["train", "validation", "test", "validation-ood", "test-ood"], str | None
    ] = Field(
        default_factory=dict,
        description="our split: its name in the data; null: not read, such as a test split without "
        "labels",
    )
    columns: dict[Literal["id", "image", "label", "split", "domain", "group"], str] = Field(
        default_factory=dict, description="our column: its name in the data"
    )
    images: PathOrName | None = Field(
        None,
        description="manifest: folder that the paths of the list are relative to; null: the folder "
        "of the list",
    )
    cameras: Cameras | None = Field(
        None,
        description="simulated camera traps: degraded images, for an example of poor quality on "
        "real photos",
    )
    own_split: OwnSplit = OwnSplit()
    long_tail: LongTail | None = None
    drop_empty_classes: bool = Field(
        False,
        description="removes classes without a training image, with their images in other splits",
    )
    bits: int | None = Field(
        None,
        ge=8,
        le=16,
        description="bit depth of grey images stored in 16 bits; null: the smallest of 8, 10, 12, "
        "14, 16 that fits the data set",
    )
    unreadable: Literal["error", "skip"] = "error"
    overlap: Literal["error", "keep"] = Field(
        "error",
        description="images in two splits: stop, or keep them as published benchmarks do "
        "(CIFAR-100 has some)",
    )


class Groups(Strict):
    """Groups of classes: more than `many` training images, fewer than `few`, and medium between."""

    many: int = Field(100, ge=1, le=10**8)
    few: int = Field(20, ge=1, le=10**8)

    @model_validator(mode="after")
    def _ordered(self) -> Groups:
        if self.few > self.many + 1:
            raise RecipeError(
                f"groups.few = {self.few} is greater than groups.many = {self.many}, so a class "
                "would be in two groups; lower groups.few."
            )
        return self


class Hard(Strict):
    """Which training images get a spectrum."""

    rule: Literal["tail", "probability"] = "tail"
    fewer_than: int = Field(
        20, ge=1, le=10**8, description="tail: classes with fewer training images than this"
    )
    below: float = Field(
        0.5,
        gt=0,
        le=1,
        description="probability: images with a smaller predicted probability of their class than "
        "this",
    )
    folds: int = Field(
        3,
        ge=2,
        le=100,
        description="probability, and filter.rule difficulty: number of folds; an image is scored "
        "by a classifier that was not trained on it or its source",
    )
    epochs: int = Field(
        10,
        ge=1,
        le=100_000,
        description="probability, and filter.rule difficulty and alia: epochs of each classifier",
    )
    exclude: Annotated[list[str], BeforeValidator(_class_names)] = Field(
        default_factory=list,
        description="names of classes whose images are never hard, such as [empty]",
    )

    @field_validator("exclude")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if twice := sorted({name for name in value if value.count(name) > 1}):
            raise RecipeError(f"hard.exclude names {', '.join(twice)} twice; name each class once.")
        return value
