"""Reads the files of a run folder into plain values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.images import decode_image
from ..evaluation.controls import takes_retrieved_images, takes_synthetic_images
from ..run_folder import paths
from ..spectrum.store import picture_shards
from ..utils.stored import read_json, read_lines, read_recipe_tree, read_table

CURRICULA = ("diverse-to-specific", "easy-to-hard", "specific-to-diverse")


@dataclass(frozen=True)
class RunSummary:
    """A finished run: its recipe, tables and figures.

    - `groups`: labels of many, medium and few; an empty group is absent.
    - `split_counts`: images per class of each split, int64 `[classes]`.
    - `plan`, `verdicts`: one row per synthetic image.
    - `retrieved`: labels of the chosen images of an archive, int64; None without an archive.
    - `results`: `{method: {split: {metric: value}}}`.
    - `making`: how the images are made, `{title: text}`.
    - `rounds`: records of the finished rounds of a loop.
    - `prices`: UNet rows of an image by its level, where they are known.
    """

    name: str
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    class_names: Sequence[str]
    groups: Mapping[str, Sequence[int]]
    split_counts: Mapping[str, np.ndarray]
    hard: Sequence[Mapping[str, Any]]
    plan: pa.Table
    verdicts: pa.Table
    histories: Mapping[str, Sequence[Mapping[str, Any]]]
    results: Mapping[str, Mapping[str, Mapping[str, Any]]]
    making: Mapping[str, str]
    retrieved: np.ndarray | None = None
    rounds: Sequence[Mapping[str, Any]] = ()
    prices: Mapping[int, int] = field(default_factory=dict)

    @property
    def learner(self) -> str | None:
        """The method that the rounds of a loop follow; None without a loop of several rounds."""
        return learner_in(self.recipe)

    @property
    def class_counts(self) -> np.ndarray:
        """Training images per class, int64 `[classes]`."""
        return self.split_counts["train"]

    @property
    def split(self) -> str:
        """The split of the page's figures: test if every method has it, else validation."""
        return "test" if all("test" in splits for splits in self.results.values()) else "validation"

    @property
    def ood(self) -> str | None:
        """Its out-of-distribution counterpart, if every method was measured on it."""
        name = f"{self.split}-ood"
        return name if all(name in splits for splits in self.results.values()) else None

    @property
    def figures(self) -> dict[str, Mapping[str, Any]]:
        """`{row: {metric: value}}` on that split; `ood_…` are on its OOD counterpart."""
        ood = self.ood
        return {
            row: {
                **splits[self.split],
                **{
                    f"ood_{metric}": value for metric, value in (splits[ood] if ood else {}).items()
                },
            }
            for row, splits in self.results.items()
        }

    @property
    def methods(self) -> list[str]:
        """Names of the trained methods, in the recipe's order."""
        return list(self.recipe["methods"])

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        return self.recipe.get("baseline") or self.methods[0]

    @cached_property
    def featured(self) -> str | None:
        """The method that the page shows with the baseline; None if there is no other.

        It is chosen by name and strategy, never by its result: `discl`, else the first with a
        curriculum over levels, else the first with synthetic images, else the first.
        """
        others = {
            name: method["strategy"]
            for name, method in self.recipe["methods"].items()
            if name != self.baseline
        }
        ranks = {
            name: (name != "discl", strategy not in CURRICULA, strategy == "real-only")
            for name, strategy in others.items()
        }
        return min(ranks, key=lambda name: ranks[name], default=None)


def learner_in(recipe: Mapping[str, Any]) -> str | None:
    """As `RunSummary.learner`, of a plain recipe."""
    loop = recipe.get("loop")
    if not loop or loop["rounds"] == 1:
        return None
    synthetic = [
        name for name, method in recipe["methods"].items() if takes_synthetic_images(method)
    ]
    return loop["learner"] or synthetic[0]


def read_run(
    folder: Path,
    class_names: Sequence[str],
    groups: Mapping[str, Sequence[int]],
    making: Mapping[str, str],
    prices: Mapping[int, int] | None = None,
) -> RunSummary:
    """The summary of a run folder. Raises RunError with the name of a missing file."""
    recipe = read_recipe_tree(folder / paths.RECIPE)
    rounds, more = folder / paths.LOOP / paths.ROUNDS, []
    if learner_in(recipe) is not None:
        more = ["round", "why"]
    listed = read_table(folder / paths.DATA, ["split", "label"])
    labels, split_of = listed["label"].to_numpy(), np.asarray(listed["split"].to_pylist())
    counts = {
        str(split): np.bincount(labels[split_of == split], minlength=len(class_names))
        for split in np.unique(split_of)
    }
    return RunSummary(
        name=folder.resolve().name,
        recipe=recipe,
        environment=read_json(folder / paths.ENVIRONMENT),
        class_names=class_names,
        groups=groups,
        split_counts=counts,
        hard=read_table(folder / paths.HARD, ["id", "label"]).to_pylist(),
        plan=read_table(
            folder / paths.PLAN,
            ["id", "source_id", "label", "level", "seed", "attempt", "prompt"],
        ),
        verdicts=read_table(
            folder / paths.FILTER,
            ["id", "label", "level", "clip_similarity", "keep", "reason", *more],
        ),
        histories={
            name: read_lines(folder / paths.TRAIN / name / paths.HISTORY, "epoch")
            for name in recipe["methods"]
        },
        results=read_json(folder / paths.RESULTS),
        making=making,
        retrieved=_read_retrieved(folder, recipe),
        rounds=read_json(rounds, "rounds")["rounds"] if more and rounds.exists() else (),
        prices=prices or {},
    )


def _read_retrieved(folder: Path, recipe: Mapping[str, Any]) -> np.ndarray | None:
    if not any(map(takes_retrieved_images, recipe["methods"].values())):
        return None
    return read_table(folder / paths.RETRIEVED, ["label"])["label"].to_numpy()


def read_pictures(store: Path | str, ids: Collection[str]) -> dict[str, Any]:
    """`{id: RGB picture}` of the ids that `store` holds."""
    rows = picture_shards(store).rows(ids, ["image"])
    return {name: decode_image(row["image"]) for name, row in rows.items()}
