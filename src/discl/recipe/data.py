"""Sections about real images: where they are, splits, which are hard."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ..data.readers import READERS
from ..errors import RecipeError, shorten
from .paths import PathOrName
from .types import LARGEST_SEED, Seed, Strict, one_of, without_default

Share = Annotated[float, Field(ge=0, lt=1)]


def _class_order(value: Any) -> Any:
    """Names that YAML takes for numbers (the classes '0' … '9') are texts again."""
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
    """As `_class_order`, a list alone."""
    if not isinstance(value, list):
        raise RecipeError(
            f"a list of class names is expected, such as [empty]; got {shorten(value)}."
        )
    return [str(name) for name in value]


class LongTail(Strict):
    """Exponential profile n_c = ⌊n_max · IR^(−c/(C−1))⌋ over the classes in `class_order`, head first."""

    n_max: int = Field(ge=1, le=10**8)
    imbalance_ratio: float = Field(ge=1, le=10**8)
    class_order: Annotated[list[str] | int | None, BeforeValidator(_class_order)] = Field(
        None,
        description="names, head first; a number shuffles with that seed; null keeps the order",
    )
    seed: Seed = 0
    index: PathOrName | None = Field(
        None,
        description="list of content digests to take from, first things first, instead of the seed's draw; a file, or embedded:cifar100",
    )


class OwnSplit(Strict):
    """Shares of a data set that comes without splits; a group (camera, burst) never straddles."""

    validation: Share = 0.1
    test: Share = 0.2
    seed: Seed = 0

    @model_validator(mode="after")
    def _training_is_left(self) -> OwnSplit:
        if self.validation + self.test >= 1:
            raise RecipeError(
                f"validation + test = {self.validation + self.test:g} leaves no image for training; keep the sum below 1."
            )
        return self


class Cameras(Strict):
    """The pictures as camera traps would have taken them, with the camera as domain; parts and degradation depend on seed and id alone.

    From the training images come pretraining (left out), train and validation, from the test images test and, by other cameras, test-ood.
    """

    seed: Seed = 0
    seen: int = Field(12, ge=1, le=10_000, description="cameras of train, validation and test")
    unseen: int = Field(6, ge=1, le=10_000, description="cameras of test-ood")
    clean: float = Field(0.2, ge=0, le=1, description="share of pictures that stay as they are")
    pretraining: Share = Field(
        0.6, description="share of the training images that only generator and CLIP may have seen"
    )
    validation: int = Field(2000, ge=1, le=10**8, description="images of validation")
    most: dict[
        Literal["train", "validation", "test", "test-ood"], Annotated[int, Field(ge=1, le=10**8)]
    ] = Field(default_factory=dict, description="split: images in it, at most")


class Data(Strict):
    """Where the real images are."""

    root: PathOrName = Field(
        description="folder of class folders, folder of Parquet files, a list, a hub data set (owner/name, owner/name:config@revision), "
        "or embedded:fashion-mnist"
    )
    format: Annotated[str, one_of("format", ("auto", *READERS))] = "auto"
    files: dict[str, PathOrName] = Field(
        default_factory=dict,
        description="their split: its list, for formats that have lists; below root, or beside the recipe",
    )
    splits: dict[
        Literal["train", "validation", "test", "validation-ood", "test-ood"], str | None
    ] = Field(
        default_factory=dict,
        description="our split: its name in the data; null: not to be read, as a test split without labels",
    )
    columns: dict[Literal["id", "image", "label", "split", "domain", "group"], str] = Field(
        default_factory=dict, description="our column: theirs"
    )
    images: PathOrName | None = Field(
        None,
        description="manifest: folder of the images that the list names, to which its paths are relative; null: the list's own",
    )
    cameras: Cameras | None = Field(
        None, description="degrade the pictures, for a low-quality example on real photos"
    )
    own_split: OwnSplit = OwnSplit()
    long_tail: LongTail | None = None
    drop_empty_classes: bool = Field(
        False,
        description="take classes without a training image out of the list, and their images out of the other splits",
    )
    bits: int | None = Field(
        None,
        ge=8,
        le=16,
        description="bits of grey pictures that are stored in 16; null: the fewest of 8, 10, 12, 14, 16 that hold the whole data set",
    )
    unreadable: Literal["error", "skip"] = "error"
    overlap: Literal["error", "keep"] = Field(
        "error",
        description="pictures that lie in two splits: stop, or keep them as published benchmarks do (CIFAR-100 has some)",
    )

    @model_serializer(mode="wrap")
    def _plain(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_default(write(self), bits=None)


class Groups(Strict):
    """Bounds of the report's groups: many has more training images than `many`, few has fewer than `few`."""

    many: int = Field(100, ge=1, le=10**8)
    few: int = Field(20, ge=1, le=10**8)

    @model_validator(mode="after")
    def _ordered(self) -> Groups:
        if self.few > self.many + 1:
            raise RecipeError(
                f"groups.few = {self.few} lies above groups.many = {self.many}; a class would be in two groups."
            )
        return self


class Hard(Strict):
    """Which training images get a spectrum."""

    rule: Literal["tail", "probability"] = "tail"
    fewer_than: int = Field(
        20, ge=1, le=10**8, description="tail: classes with fewer training images than this"
    )
    below: float = Field(
        0.5, gt=0, le=1, description="probability: images whose true class gets less than this"
    )
    folds: int = Field(
        3, ge=2, le=100, description="probability: no image is judged by a classifier that saw it"
    )
    epochs: int = Field(
        10, ge=1, le=100_000, description="probability: epochs of each fold's classifier"
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
