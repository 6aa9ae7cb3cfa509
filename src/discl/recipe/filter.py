"""Sections `filter` and `retrieval`: which synthetic images are kept, which real ones are added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import (
    Field,
    model_validator,
)

from ..baselines.alia import NEGATIVE_PROMPTS
from ..data.readers import READERS
from ..errors import RecipeError, unknown
from .paths import PathOrName
from .types import LevelKey, Strict, Template, one_of


class Retrieval(Strict):
    """Images of an unlabelled archive for methods with `images: retrieved`.

    `filter.checkpoint` assigns each image of the archive to the class whose text it is closest to.
    For each class with hard images the closest ones are chosen. Copies of images of the data set
    are left out.
    """

    archive: PathOrName = Field(
        description="folder with images at any depth, list, or any other data set that data.root "
        "may name; labels are not read"
    )
    format: Annotated[str, one_of("format", ("auto", *READERS))] = "auto"
    columns: dict[Literal["id", "image"], str] = Field(
        default_factory=dict, description="our column: its name in the archive"
    )
    images: PathOrName | None = Field(
        None,
        description="manifest: folder that the paths of the list are relative to; null: the folder "
        "of the list",
    )
    per_image: float = Field(3.0, gt=0, le=10_000, description="images for each hard image")
    threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="minimum clip_similarity with the text of the class; null: filter.threshold",
    )
    image_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="weight of the cosine with the mean training image of a class, beside that "
        "with its text",
    )
    copy_cosine: float = Field(
        0.95,
        gt=0,
        le=1,
        description="images with a CLIP cosine of at least this with an image of the data set are "
        "left out as copies",
    )


Share = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
BAND = (0.05, 0.95)
"""The default of `filter.band`."""


class Filter(Strict):
    """The filter of synthetic images before training.

    - `threshold`: drops images with a `clip_similarity` (raw cosine) below the threshold.
    - `difficulty`: drops images below the threshold, and images that a classifier of the real
      images finds too hard or too easy: its probability of their class is outside of `band`. It is
      cross-fitted, so it has not seen the real image that an image is made from.
    - `alia`: the two filters of ALIA (arXiv 2305.16289). It drops images that CLIP finds closer to
      one of `negatives` than to their class. It also drops images that are too easy or mislabelled:
      a classifier trained on the real images for `hard.epochs` is more confident than on average.
    """

    LATER = ("band", "level_thresholds", "class_thresholds")

    checkpoint: PathOrName = Field(
        description="CLIP folder in transformers' format, hub name, or embedded:fashion-mnist"
    )
    template: Template = "a photo of {class}"
    threshold: float = Field(0.3, ge=-1, le=1)
    level_thresholds: dict[LevelKey, Cosine] = Field(
        {}, description="levels with a threshold of their own, for example {30: 0.28}"
    )
    class_thresholds: dict[str, Cosine] = Field(
        {},
        max_length=100_000,
        description="classes with a threshold of their own, by name; it comes before that of the "
        "level",
    )
    rule: Literal["threshold", "difficulty", "alia"] = "threshold"
    band: tuple[Share, Share] | None = Field(
        None,
        description="difficulty: lowest and highest probability of their class that images are "
        "kept with, all classes equally likely; null: [0.05, 0.95]",
    )
    negatives: list[str] = Field(
        list(NEGATIVE_PROMPTS), min_length=1, description="alia: texts that fit any image"
    )
    positive: str | None = Field(
        None,
        min_length=1,
        description="alia: one text for all classes that images are compared with; null: the "
        "template",
    )

    def threshold_of(self, class_name: str, level: int) -> float:
        """The threshold of an image: that of its class, else of its level, else the common one."""
        common = self.level_thresholds.get(level, self.threshold)
        return self.class_thresholds.get(class_name, common)

    def check_classes(self, class_names: Sequence[str]) -> None:
        """Raises RecipeError for a threshold of a class that does not exist."""
        for name in self.class_thresholds:
            if name not in class_names:
                raise RecipeError(unknown("class in filter.class_thresholds", name, class_names))

    @property
    def has_own_thresholds(self) -> bool:
        """Whether levels or classes have a threshold of their own."""
        return bool(self.level_thresholds or self.class_thresholds)

    @model_validator(mode="after")
    def _band_is_used(self) -> Filter:
        if self.band is None:
            return self
        low, high = self.band
        if self.rule != "difficulty":
            raise RecipeError(
                f"filter.band = [{low:g}, {high:g}] needs filter.rule: difficulty; add it, or "
                "remove the band."
            )
        if low >= high:
            raise RecipeError(
                f"filter.band = [{low:g}, {high:g}] keeps nothing; write the lower probability "
                "first."
            )
        return self

    @model_validator(mode="after")
    def _positive_is_used(self) -> Filter:
        if self.positive is not None and self.rule != "alia":
            raise RecipeError(
                "filter.positive needs filter.rule: alia; remove it, or use filter.template."
            )
        return self
