"""What the rounds of a loop ask for, as far as their records go."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from ..curriculum.allocation import allocate
from ..curriculum.policies import Cell, Policy, check_wishes, make_policy
from ..curriculum.rounds import drawn_levels, offered_levels, round_shares, round_starts
from ..curriculum.schedule import Record
from ..errors import BrokenFileError, RecipeError, RunError
from ..recipe.loop import Loop, learner_of
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.clip_filter import describe_scorer
from ..spectrum.plan import Planner, Request
from ..training.checkpoint import copy_checkpoint, finished_epochs
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.plugins import read_piece
from ..utils.stored import AGAIN, broken, read_json, write_text
from .budget import find_cap, first_seeds, rows_by_level, unit_of
from .pending import filter_texts, planned_sources
from .prompts import ensure_texts
from .sample_pool import held_out_sources
from .trained import fingerprint

logger = get_logger(__name__)


@dataclass(frozen=True)
class Asked:
    """A request, the round that asks for it (from 0), and why."""

    request: Request
    round: int
    why: str


def rounds_key(run: Run, learner: str) -> str:
    """Digest of everything that the rounds depend on, but for the images themselves."""
    recipe = run.recipe
    nothing = Dataset.from_dict({"id": [], "label": [], "round": []})
    return digest(
        fingerprint(run, learner, recipe.methods[learner], nothing),
        recipe.loop.model_dump(mode="json") if recipe.loop else None,
        recipe.spectrum.budget.model_dump(mode="json") if recipe.spectrum.budget else None,
        recipe.spectrum.seeds,
        recipe.plain()["spectrum"].get("early_rejection"),
        recipe.filter.threshold,
        describe_scorer(recipe.filter.checkpoint, filter_texts(run)),
        run.sampling.identity(),
        recipe.prompts.negative,
        {str(label): list(texts) for label, texts in ensure_texts(run).items()},
        [[row["id"], row["digest"], row.get("caption", "")] for row in planned_sources(run)],
    )


def read_rounds(run: Run, learner: str) -> list[Record]:
    """Records of the finished rounds; none if they are of another recipe or cannot be read."""
    path = run.path(paths.LOOP) / paths.ROUNDS
    if not path.exists():
        return []
    try:
        kept = read_json(path, "key", "rounds")
        if kept["key"] != rounds_key(run, learner):
            return []
        if not _are_records(kept["rounds"]):
            raise broken(path, "does not hold the records of rounds", AGAIN)
    except BrokenFileError as error:
        problem = str(error).removesuffix(f" {AGAIN}")
        logger.warning(f"{problem} So the rounds start again; images that exist are used.")
        return []
    loop = run.recipe.loop
    return list(kept["rounds"])[: loop.rounds - 1 if loop else 0]


def _are_records(values: Any) -> bool:
    """Whether these are records of rounds, as `rounds.py` writes them."""
    if not isinstance(values, list) or not all(isinstance(each, dict) for each in values):
        return False
    return all(
        record.get("round") == number
        and isinstance(record.get("kept_digest"), str)
        and _are_numbers(record.get("epochs"), 2)
        and all(_by_cell(record.get(name), _is_number) for name in ("asked", "kept", "rows"))
        and _by_cell(record.get("measured"), _are_measured)
        for number, record in enumerate(values)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_numbers(values: Any, count: int | None = None) -> bool:
    return (
        isinstance(values, list)
        and all(map(_is_number, values))
        and (count is None or len(values) == count)
    )


def _are_measured(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(_are_numbers(value.get(name)) for name in ("entropy", "probability"))
        and len(value["entropy"]) == len(value["probability"])
    )


def _by_cell(values: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether these are values by class and level, `{label: {level: value}}`."""
    return isinstance(values, dict) and all(
        label.isdecimal()
        and isinstance(levels, dict)
        and all(level.isdecimal() and fits(value) for level, value in levels.items())
        for label, levels in values.items()
    )


def write_rounds(run: Run, learner: str, history: Sequence[Record]) -> None:
    """Writes the records of the finished rounds."""
    values = {"key": rounds_key(run, learner), "rounds": list(history)}
    write_text(run.path(paths.LOOP) / paths.ROUNDS, json.dumps(values) + "\n")


def kept_digests(synthetic: Dataset) -> dict[int, str]:
    """`{round: digest of the ids of its kept images}`."""
    ids: dict[int, list[str]] = {}
    for name, number in zip(synthetic["id"][:], synthetic["round"][:], strict=True):
        ids.setdefault(number, []).append(name)
    return {number: digest(each) for number, each in ids.items()}


def training_key(run: Run, learner: str, synthetic: Dataset, number: int) -> str:
    """Identifies the training of the rounds up to `number` on their kept images."""
    digests = kept_digests(synthetic)
    kept = [digests.get(each, "") for each in range(number + 1)]
    return digest(rounds_key(run, learner), kept)


def adopt_rounds(run: Run, learner: str, fingerprint: str, synthetic: Dataset) -> None:
    """Lets the training of the learner go on from the last round, if its folder is empty.

    Without the rounds, as in the folder of another seed, it goes through them again: what an epoch
    draws is a function of the images of the rounds so far.

    - `fingerprint`: of the training.
    - `synthetic`: the kept images, with their `round`.
    """
    checkpoint = run.path(paths.TRAIN) / learner / paths.CHECKPOINT
    source = run.path(paths.LOOP) / paths.LEARNER / paths.CHECKPOINT
    train, loop = run.recipe.training(learner), run.recipe.loop
    if loop is None or checkpoint.exists() or train.select != "last" or not source.exists():
        return
    last = round_starts(loop.rounds, train.curriculum_epochs)[-1]
    key = training_key(run, learner, synthetic, loop.rounds - 2)
    if finished_epochs(source, key) == last:
        copy_checkpoint(source, checkpoint, fingerprint)


class RoundPlanner:
    """Plans the rounds of a loop one after the other, from the records of those before."""

    def __init__(self, run: Run, learner: str) -> None:
        recipe = run.recipe
        if recipe.loop is None:
            raise RunError("the recipe has no section loop.")
        self.run, self.loop = run, recipe.loop
        self.levels = sorted(recipe.spectrum.levels)
        train, method = recipe.training(learner), recipe.methods[learner]
        self.strategy = method.make_strategy(train, self.levels, run.allow_plugins)
        starts = round_starts(self.loop.rounds, train.curriculum_epochs)
        self.planned = drawn_levels(self.strategy, starts, train.curriculum_epochs, self.levels)
        self.policy: Policy = make_policy(self.loop.policy, self.loop.rounds, run.allow_plugins)
        self.rows = rows_by_level(run)
        self.sources = planned_sources(run)
        self.by_id = {row["id"]: row for row in self.sources}
        self.apart = held_out_sources(run)
        self.trained: dict[int, list[str]] = {}
        apart = set(self.apart)
        for row in self.sources:
            if row["id"] not in apart:
                self.trained.setdefault(row["label"], []).append(row["id"])
        cap = find_cap(run, self.sources)
        self.prices: Mapping[int, int] = self.rows if cap is None else cap.prices
        whole = len(self.sources) * first_seeds(run) * sum(self.prices.values())
        self.amount = whole if cap is None else cap.amount
        shares = round_shares(self.planned, self.loop.rounds, self.prices)
        self.limits = np.cumsum(shares) * self.amount * (1 + 1e-12)
        self.planner = Planner(ensure_texts(run), recipe.prompts.negative, run.sampling)
        self.asked: Counter[tuple[int, int]] = Counter()
        self.spent = 0.0

    def check_budget(self) -> None:
        """Raises RecipeError if the budget of a round has no image for each class and level."""
        before = 0.0
        for number, limit in enumerate(self.limits.tolist()):
            levels = self.levels if self.planned is None else self.planned[number]
            least = sum(self.prices[level] for level in levels) * len(self.trained)
            if number == 0:
                least += len(self.apart) * sum(self.prices[level] for level in self.levels)
            if limit - before < least and (number == 0 or self.planned is not None):
                raise RecipeError(
                    f"round {number + 1} of {self.loop.rounds} may spend "
                    f"{unit_of(self.run, int(limit - before))}, and an image of each class at each "
                    f"of its levels{', with those to measure on,' * bool(self.apart)} takes "
                    f"{unit_of(self.run, least)}. Use fewer rounds, or raise spectrum.budget or "
                    "spectrum.seeds.",
                    argument="loop.rounds",
                )
            before = limit

    def next_round(self, history: Sequence[Record]) -> list[Asked]:
        """What the round after those of `history` asks for, by source, seed and level."""
        number, asked = len(history), []
        if number == 0:
            why = "held out: the learner is measured on it"
            asked = [
                Asked(self._request(source, level, 0), 0, why)
                for source in self.apart
                for level in self.levels
            ]
        self.spent += sum(self.prices[each.request.level] for each in asked)
        offered = offered_levels(self.strategy, self.planned, self.levels, history)
        cells = self._cells(offered)
        wishes = list(self.policy.weigh(number, cells, history))
        check_wishes(read_piece("policy", self.loop.policy)[0], wishes, cells)
        counts = allocate(
            float(self.limits[number]) - self.spent,
            [self.prices[cell.level] for cell in cells],
            wishes,
            [cell.sources for cell in cells],
            explore=self.loop.explore,
            least=[int(not self.asked[cell.label, cell.level]) for cell in cells],
        )
        for cell, wish, count in zip(cells, wishes, counts.tolist(), strict=True):
            asked += [Asked(each, number, wish.why) for each in self._draw(cell, count)]
            self.spent += count * self.prices[cell.level]
        places = {row["id"]: place for place, row in enumerate(self.sources)}

        def order(each: Asked) -> tuple[int, int, int]:
            return places[each.request.source_id], each.request.seed, each.request.level

        return sorted(asked, key=order)

    def _cells(self, levels: Sequence[int]) -> list[Cell]:
        counts = self.run.train.class_counts
        return [
            Cell(
                label,
                level,
                sources=len(self.trained[label]),
                rows=self.rows[level],
                real=int(counts[label]),
                largest=int(counts.max()),
            )
            for label in sorted(self.trained)
            for level in levels
        ]

    def _draw(self, cell: Cell, count: int) -> list[Request]:
        """The next draws of a cell: seed after seed, sources in turn."""
        sources, key = self.trained[cell.label], (cell.label, cell.level)
        first, requests = self.asked[key], []
        for number in range(first, first + count):
            seed, turn = divmod(number, len(sources))
            turn = (turn + self.levels.index(cell.level) + seed) % len(sources)
            requests.append(self._request(sources[turn], cell.level, seed))
        self.asked[key] += count
        return requests

    def _request(self, source: str, level: int, seed: int) -> Request:
        return self.planner.request(self.by_id[source], level, seed)


def plan_rounds(run: Run, learner: str) -> list[Asked]:
    """What all finished rounds and the next one ask for, round after round."""
    planner, history = RoundPlanner(run, learner), read_rounds(run, learner)
    planner.check_budget()
    return [
        each for number in range(len(history) + 1) for each in planner.next_round(history[:number])
    ]


def describe_rounds(run: Run) -> str:
    """How far the loop is, in one line; empty without a loop of several rounds."""
    learner, loop = learner_of(run.recipe), run.recipe.loop
    if learner is None or loop is None:
        return ""
    number = len(read_rounds(run, learner)) + 1
    policy, planner = read_piece("policy", loop.policy)[0], RoundPlanner(run, learner)
    return (
        f"round {number} of {loop.rounds} ({policy}, learner {learner}): later rounds are planned "
        f"when it is trained; all rounds together take {unit_of(run, int(planner.amount))} at most"
    )


def loop_of(run: Run) -> Loop | None:
    """The loop of the run, None without several rounds."""
    return run.recipe.loop if learner_of(run.recipe) is not None else None


def cells_of(rows: Sequence[Mapping[str, Any]], values: Sequence[float]) -> dict[str, Any]:
    """Sums of values by class and level, `{label: {level: sum}}` with texts as keys."""
    result: dict[str, Any] = {}
    for row, value in zip(rows, values, strict=True):
        own = result.setdefault(str(row["label"]), {})
        own[str(row["level"])] = own.get(str(row["level"]), 0) + value
    return result
