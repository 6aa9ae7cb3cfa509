"""Which images a round of the loop asks for: policies that weigh its cells.

A cell is a class at a level. A policy gives each cell a weight. It is a pure function of the round
(from 0) and of the records of finished rounds, so a resumed run asks for the same images. A record
holds plain values:

- `asked`, `kept`: images of the round, `{label: {level: count}}`, with keys as texts.
- `rows`: UNet rows of the round, in the same shape.
- `measured`: what the learner makes of images that it was not trained on,
  `{label: {level: {"entropy": [...], "probability": [...]}}}`. Level 100 are real hard images.
  Entropy is divided by the logarithm of the number of classes, so it is in [0, 1].

A custom policy is a class with the methods of `Policy`. It is named as `module:attribute` or by an
entry point of the group `discl.policies`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import RecipeError, shorten
from ..levels import REAL
from ..utils.plugins import check_parameters, find_piece, named_parameters, read_piece
from .bandit import ucb_indices
from .progress import shrunk_mean

GROUP = "discl.policies"
History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """A class at a level.

    - `label`, `level`: of the images.
    - `sources`: hard images that they can be made from.
    - `rows`: UNet rows of one image.
    - `real`: real training images of the class.
    - `largest`: real training images of the largest class.

    ```python
    import discl

    cell = discl.Cell(label=0, level=50, sources=4, rows=10, real=4, largest=90)
    ```
    """

    label: int
    level: int
    sources: int
    rows: int
    real: int
    largest: int


class Wish(NamedTuple):
    """What a policy wants of a cell.

    - `weight`: images relative to those of other cells, 0 or more.
    - `most`: images at most.
    - `why`: the reason, for the image's row.

    ```python
    import discl

    assert discl.Wish(2.0, why="rare class").most == float("inf")
    ```
    """

    weight: float
    most: float = inf
    why: str = ""


class Policy(Protocol):
    """Weighs the cells of a round; pure in (number, history).

    ```python
    import discl


    class Rarest:  # a recipe names it as policy: my_module:Rarest
        measures = False

        def weigh(self, number, cells, history):
            return [discl.Wish(1 / cell.real, why="rare class") for cell in cells]


    policy: discl.Policy = Rarest()
    ```
    """

    measures: bool
    """Whether it reads `measured`, for which some hard images are held out of training."""

    def weigh(self, number: int, cells: Sequence[Cell], history: History) -> Sequence[Wish]:
        """One wish for each cell.

        - `number`: of the round, from 0.
        - `cells`: those that the round may ask for.
        - `history`: the records of the rounds before.
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """Every hard image at every level alike, as a run without a loop."""

    measures = False

    def weigh(self, number: int, cells: Sequence[Cell], history: History) -> list[Wish]:
        return [Wish(cell.sources, why="uniform") for cell in cells]


@dataclass(frozen=True)
class Deficit:
    """Fills each class to a target count, evenly over the rounds that are left.

    What a class lacks is divided by the fraction of its images that the filter kept so far.

    - `rounds`: of the loop.
    - `target`: real and kept images per class; None: the size of the largest class.
    """

    rounds: int
    target: int | None = None
    measures = False

    def weigh(self, number: int, cells: Sequence[Cell], history: History) -> list[Wish]:
        asked, kept = total(history, "asked"), total(history, "kept")
        levels = np.bincount([cell.label for cell in cells])
        wishes = []
        for cell in cells:
            goal = cell.largest if self.target is None else self.target
            have = sum(kept.get(cell.label, {}).values())
            lacking = max(goal - cell.real - have, 0)
            rate = (have + 1) / (sum(asked.get(cell.label, {}).values()) + 1)
            wanted = lacking / rate / levels[cell.label] / max(self.rounds - number, 1)
            wishes.append(Wish(wanted, wanted, f"deficit: {lacking} images lack"))
        return wishes


@dataclass(frozen=True)
class Entropy:
    """Cells on which the learner is unsure, within a band of difficulty.

    The weight is the mean entropy over held-out images whose true-class probability is in the band;
    others count 0. Medium difficulty teaches most (arXiv 2411.18109); the entropy of the learner
    chooses what is made in arXiv 2502.15588.

    - `low`, `high`: the band of the true-class probability, in [0, 1].
    """

    low: float = 0.05
    high: float = 0.95
    measures = True

    def weigh(self, number: int, cells: Sequence[Cell], history: History) -> list[Wish]:
        if not history:
            return [Wish(cell.sources, why="nothing is measured yet") for cell in cells]
        scores = shrunk_means(history[-1]["measured"], self._unsure)
        return [
            Wish(
                score * cell.sources,
                why=f"entropy {score:.3f} of held-out images within the band",
            )
            for cell in cells
            for score in [scores(cell.label, cell.level)]
        ]

    def _unsure(self, images: Mapping[str, Sequence[float]]) -> list[float]:
        return [
            entropy * (self.low <= probability <= self.high)
            for entropy, probability in zip(images["entropy"], images["probability"], strict=True)
        ]


@dataclass(frozen=True)
class Progress:
    """Cells whose images brought most per UNet row: a discounted bandit over the cells.

    The reward of a cell in a round is the gain of the true-class probability on held-out real
    images of its class, per UNet row of the class. Cells in the upper half by their upper
    confidence bound are asked for (arXiv 0805.3415, section 3).

    - `discount`: weight of a round relative to the next one, in (0, 1].
    - `exploration`: ξ of the confidence bound, 0 or more.
    """

    discount: float = 0.9
    exploration: float = 0.05
    measures = True

    def weigh(self, number: int, cells: Sequence[Cell], history: History) -> list[Wish]:
        place = {(cell.label, cell.level): index for index, cell in enumerate(cells)}
        drawn, rewards = [], []
        for before, record in pairwise(history):
            earlier, later = (_real_probability(each["measured"]) for each in (before, record))
            for label, rows in _by_label(record["rows"]).items():
                gain = later(label, REAL) - earlier(label, REAL)
                for level, spent in rows.items():
                    if spent and (label, level) in place:
                        drawn.append(place[label, level])
                        rewards.append(gain / sum(rows.values()))
        scale = max(map(abs, rewards), default=0.0) or 1.0
        indices = ucb_indices(
            drawn,
            [reward / scale for reward in rewards],
            len(cells),
            discount=self.discount ** (1 / max(len(cells), 1)),
            exploration=self.exploration,
        )
        bound = np.median(indices[np.isfinite(indices)]) if np.isfinite(indices).any() else -inf
        return [
            Wish(cell.sources * float(index >= bound), why=_progress_reason(index))
            for cell, index in zip(cells, indices.tolist(), strict=True)
        ]


def _progress_reason(index: float) -> str:
    return "progress: not tried yet" if index == inf else f"progress: bound {index:.3f}"


def _real_probability(measured: Mapping[str, Any]) -> Callable[[int, int], float]:
    return shrunk_means(measured, lambda images: images["probability"])


def _by_label(counts: Mapping[str, Mapping[str, float]]) -> dict[int, dict[int, float]]:
    """A record's `{label: {level: value}}` with numbers as keys."""
    return {
        int(label): {int(level): value for level, value in levels.items()}
        for label, levels in counts.items()
    }


def total(history: History, name: str) -> dict[int, dict[int, float]]:
    """Sums of a count over all rounds, `{label: {level: sum}}`."""
    result: dict[int, dict[int, float]] = {}
    for record in history:
        for label, levels in _by_label(record[name]).items():
            own = result.setdefault(label, {})
            for level, value in levels.items():
                own[level] = own.get(level, 0) + value
    return result


def shrunk_means(
    measured: Mapping[str, Any], values: Callable[[Mapping[str, Any]], Iterable[float]]
) -> Callable[[int, int], float]:
    """A function to the `shrunk_mean` of a (class, level); 0 where nothing is measured there."""
    own = {
        (int(label), int(level)): np.asarray(list(values(images)), np.float64)
        for label, levels in measured.items()
        for level, images in levels.items()
    }

    def mean(label: int, level: int) -> float:
        everything = [each for (_, at), each in sorted(own.items()) if at == level and len(each)]
        if not everything:
            return 0.0
        common = float(np.concatenate(everything).mean())
        mine = own.get((label, level), np.zeros(0))
        return shrunk_mean(float(mine.sum()), len(mine), common)

    return mean


POLICIES: dict[str, Callable[..., Policy]] = {
    "uniform": Uniform,
    "deficit": Deficit,
    "entropy": Entropy,
    "progress": Progress,
}
BOUNDS = {
    "target": (1, 10**9),
    "low": (0, 1),
    "high": (0, 1),
    "discount": (1e-6, 1),
    "exploration": (0, 1e6),
}
"""Least and greatest value of each parameter of a built-in policy."""


def make_policy(
    config: str | Mapping[str, Any], rounds: int, allow_plugins: bool = False
) -> Policy:
    """The policy of a name or of `{name: entropy, low: 0.1}`.

    - `config`: a built-in policy, that of an installed package, or `module:attribute`.
    - `rounds`: of the loop; a policy that names the argument gets it.
    - `allow_plugins`: whether `module:attribute` may be imported.

    Raises RecipeError for an unknown name or parameter, a value out of range, `module:attribute`
    without `allow_plugins`, and for what is no policy.

    ```python
    from discl.curriculum.policies import Cell, make_policy

    policy = make_policy({"name": "deficit", "target": 30}, rounds=2)
    (wish,) = policy.weigh(0, [Cell(0, 50, sources=4, rows=10, real=10, largest=90)], [])
    assert wish.most == 10  # half of what the class lacks
    ```
    """
    name, given = read_piece("policy", config)
    found = find_piece("policy", name, POLICIES, GROUP, allow_plugins)
    known = [each.name for each in named_parameters(found)]
    check_parameters("policy", name, given, [each for each in known if each != "rounds"])
    if name in POLICIES:
        for key, value in given.items():
            _check_value(name, key, value)
    if name == "entropy" and given.get("low", Entropy.low) >= given.get("high", Entropy.high):
        raise RecipeError("policy entropy: low has to be less than high.")
    try:
        policy = found(**given, **({"rounds": rounds} if "rounds" in known else {}))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"policy {name}: {shorten(str(error), 300, quoted=False)}") from error
    if not callable(getattr(policy, "weigh", None)) or not hasattr(policy, "measures"):
        raise RecipeError(
            f"policy '{shorten(name, quoted=False)}' gives a {type(policy).__name__}; a policy has "
            "a method weigh(number, cells, history) and an attribute measures."
        )
    return policy


def _check_value(name: str, key: str, value: Any) -> None:
    low, high = BOUNDS[key]
    kinds = int if key == "target" else (int, float)
    if value is None and key == "target":
        return
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "a whole number" if key == "target" else "a number"
        raise RecipeError(
            f"policy {name}: {key} is {what} from {low:g} to {high:g}; got {shorten(value)}."
        )


def check_wishes(name: str, wishes: Sequence[Wish], cells: Sequence[Cell]) -> None:
    """Raises RecipeError for wishes that are not one finite weight of 0 or more for each cell."""
    try:
        numbers = [(float(each.weight), float(each.most)) for each in wishes]
    except (AttributeError, TypeError, ValueError) as error:
        raise RecipeError(f"policy {name}: weigh has to return Wish values: {error}.") from error
    if len(numbers) != len(cells):
        raise RecipeError(f"policy {name}: {len(numbers)} wishes for {len(cells)} cells.")
    for weight, most in numbers:
        if not 0 <= weight < inf or not most >= 0:
            raise RecipeError(
                f"policy {name}: weights and limits are 0 or more; got weight {weight}, most "
                f"{most}."
            )
