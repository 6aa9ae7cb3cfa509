"""The rounds of a loop as rows of a table: what was asked, what it cost, what was learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .run_summary import RunSummary

MOST_REASONS = 3


@dataclass(frozen=True)
class RoundRow:
    """A round of the loop.

    - `number`: from 1; `epochs`: the first and the last, from 1.
    - `levels`: of its images; `asked`, `kept`: their numbers.
    - `rows`: UNet rows, None if they are unknown.
    - `accuracy`, `hard_accuracy`: of the learner on validation after the round, in [0, 1]; the
      second on the classes with hard images. None if it was not measured.
    - `reasons`: the most frequent reasons, with their numbers of images.
    """

    number: int
    epochs: tuple[int, int]
    levels: tuple[int, ...]
    asked: int
    kept: int
    rows: int | None
    accuracy: float | None
    hard_accuracy: float | None
    reasons: tuple[tuple[str, int], ...]


def round_rows(summary: RunSummary) -> list[RoundRow]:
    """One row for each round; none without a loop of several rounds."""
    if summary.learner is None:
        return []
    history = summary.histories[summary.learner]
    verdicts = summary.verdicts.select(["round", "level", "keep", "why"]).to_pylist()
    numbers = range(int(summary.recipe["loop"]["rounds"]))
    records = {record["round"]: record for record in summary.rounds}
    starts = [records[number]["epochs"][0] for number in sorted(records)]
    starts.append(records[max(records)]["epochs"][1] if records else 0)
    ends = [*starts[1:], len(history)]
    rows = []
    for number in numbers:
        own = [each for each in verdicts if each["round"] == number]
        learnt = records.get(number, {}).get("validation") or {}
        if number == numbers[-1] and history:
            learnt = {"accuracy": history[-1].get("validation_accuracy")}
        known = number < len(starts)
        rows.append(
            RoundRow(
                number + 1,
                (starts[number] + 1, ends[number]) if known else (0, 0),
                tuple(sorted({each["level"] for each in own})),
                len(own),
                sum(each["keep"] for each in own),
                _cost(own, summary.prices),
                learnt.get("accuracy"),
                learnt.get("hard_accuracy"),
                tuple(Counter(each["why"] for each in own).most_common(MOST_REASONS)),
            )
        )
    return rows


def _cost(images: list[dict[str, int]], prices: Mapping[int, int]) -> int | None:
    levels = [each["level"] for each in images]
    return sum(prices[level] for level in levels) if set(levels) <= set(prices) else None
