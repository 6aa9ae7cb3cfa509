"""`discl browse`: real images by their content, and the filter with a new threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import RunError
from ..recipe import load_recipe
from ..run_folder import paths
from ..run_folder.open import open_run
from ..run_folder.run import Run
from ..utils.counts import count_be
from ..utils.stored import read_table
from .pending import draws_so_far, rejected_on_the_way
from .plan import check_models


class RealImages:
    """The real images of a run by the digest of their pixels.

    - `folder`: the run folder.

    Raises DisclError where recipe or data cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.run = Run(load_recipe(folder / paths.RECIPE), folder)
        self.class_names = self.run.train.class_names
        listed = read_table(self.run.path(paths.DATA), ["split", "digest"]).to_pydict()
        self.places: dict[str, tuple[str, int]] = {}
        counts: dict[str, int] = {}
        for split, content in zip(listed["split"], listed["digest"], strict=True):
            row = counts.get(split, 0)
            counts[split] = row + 1
            self.places.setdefault(content, (split, row))

    def __contains__(self, content: str) -> bool:
        return content in self.places

    def picture(self, content: str) -> Image.Image:
        """RGB picture. Raises DataError if it cannot be read, RunError if it has changed."""
        split, row = self.places[content]
        return self.run.checked_image(row, content, split)


def amend_thresholds(
    folder: Path, changes: Mapping[str, Any], run_until: Callable[[Run, str], Path]
) -> None:
    """Filters a run with other thresholds, as `discl filter --amend` does; nothing is generated.

    - `changes`: values of the recipe, such as `{"filter.threshold": 0.28}`.
    - `run_until`: runs the stages up to one.

    Raises RunError where images would have to be generated, before anything changes.
    """
    recipe = load_recipe(folder / paths.RECIPE, dict(changes))
    planned = Run(recipe, folder)
    present = planned.spectrum.ids() | set(rejected_on_the_way(planned))
    missing = sum(request.id not in present for request in draws_so_far(planned)[0])
    if missing:
        raise RunError(
            f"{count_be(missing, 'image')} not generated yet, which takes longer than a page "
            "waits; run the command in a terminal."
        )
    run = open_run(recipe, folder, True, partial(check_models, stage="filter"))
    run_until(run, "filter")
