"""Sections `evaluate` and `compare`: what is measured, and how settings are searched."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from ..assets import published_figures
from ..errors import RecipeError
from .types import Seed, Strict


def _published(value: str) -> str:
    published_figures(value)
    return value


class Evaluate(Strict):
    LATER = ("tau_normalisation", "test_time_crops", "test_time_margin")

    worst_k: list[Annotated[int, Field(ge=1, le=10**8)]] = Field([1, 3], max_length=100)
    logit_adjustment: list[Annotated[float, Field(ge=-100, le=100)]] = Field(
        [1.0],
        min_length=1,
        max_length=1000,
        description="candidate strengths τ of post-hoc logit adjustment, chosen on validation",
    )
    tau_normalisation: list[Annotated[float, Field(ge=0, le=10)]] = Field(
        default_factory=list,
        max_length=1000,
        description="candidate τ of a linear head with its class vectors ÷ ‖w‖^τ, chosen on "
        "validation; empty: no row METHOD+tau",
    )
    weight_ensembling: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        description="clip: candidate fractions α of the tuned weights, chosen on validation; "
        "empty: no row METHOD+we",
    )
    test_time_crops: Literal[1, 5] = Field(
        1,
        description="5: the logits of an image are the mean over the centre and the four corners "
        "of a larger square",
    )
    test_time_margin: int | None = Field(
        None,
        ge=1,
        le=8192,
        description="5 crops: side of the larger square less train.image_size; null: 24 per 224 "
        "pixels",
    )

    @model_validator(mode="after")
    def _margin_of_crops(self) -> Evaluate:
        if self.test_time_margin is not None and self.test_time_crops == 1:
            raise RecipeError(
                f"evaluate.test_time_margin = {self.test_time_margin} is of five crops, and "
                "evaluate.test_time_crops is 1; set it to 5, or remove the margin."
            )
        return self


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
