"""Methods × seeds: mean ± std, paired intervals.

Plain numbers in, plain text out: `{method: [figure of each seed]}` and the right and wrong of every image.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..escaping import for_csv, for_latex, for_markdown
from ..utils.hashing import derive_seed


@dataclass(frozen=True)
class Interval:
    """A difference in percentage points and its bootstrap interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Entry:
    """A method's row: `{column: figures of the seeds in [0, 1]}`, intervals against the baseline, costs by name, published per cents."""

    name: str
    figures: Mapping[str, Sequence[float]]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)


ENDS = (0.025, 0.975)
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The quantile .975 of Student's t with 1 to 9 degrees of freedom."""


def stretch(seeds: int) -> float:
    """By how much a bootstrap over so few seeds is too narrow: t_{n−1} / z · √(n / (n − 1)) at .975; 1 for one seed.

    A mean over n draws with replacement varies with n in the place of n − 1, and its percentiles are those of a normal variable where
    t's are due (arXiv 1411.5279). That is 2.69 for three seeds, 1.58 for five and 1.22 for ten.
    """
    if seeds == 1:
        return 1.0
    free, z = seeds - 1, 1.95996
    t = (
        STUDENT[free - 1] if free <= len(STUDENT) else z + 2.3723 / free + 2.8226 / free**2
    )  # Cornish and Fisher
    return float(t / z * np.sqrt(seeds / free))


def _interval(gains: np.ndarray, replicated: np.ndarray, rng: np.random.Generator) -> Interval:
    """Of the gains `[seeds]` and of their mean on drawn images `[replicates]`; drawn seeds are added, with their deviations `stretch`ed."""
    drawn = gains[rng.integers(len(gains), size=(len(replicated), len(gains)))].mean(1)
    low, high = np.quantile(replicated + stretch(len(gains)) * (drawn - gains.mean()), ENDS).clip(
        -1, 1
    )
    return Interval(100 * float(gains.mean()), 100 * float(low), 100 * float(high))


def paired_interval(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    members: Sequence[int] | None = None,
    *,
    replicates: int = 2000,
) -> Interval | None:
    """How much better `first` is than `second`, both bool `[seeds, images]` (right or wrong) on the same images and seeds.

    Over all images (`members` None), or the mean over the classes in `members`. The percentile bootstrap draws images within each class,
    the same for all seeds and both methods, and seeds, whose deviations are `stretch`ed, for they are few. With one seed the interval
    knows of images only. None where no image is of these classes. Raises ValueError for arrays of different shape.
    """
    if first.shape != second.shape or first.shape[1] != len(labels):
        raise ValueError(
            f"paired figures of {first.shape} and {second.shape} over {len(labels)} images do not match."
        )
    classes = np.unique(labels) if members is None else np.intersect1d(members, labels)
    if not len(classes):
        return None
    rng = np.random.default_rng(derive_seed("paired-interval", 0))
    gain = first.astype(np.int8) - second.astype(np.int8)
    exact, replicated, total = np.zeros(len(gain)), np.zeros(replicates), 0.0
    for label in classes:
        part = gain[:, labels == label]
        patterns, counts = np.unique(
            part.T, axis=0, return_counts=True
        )  # few distinct outcomes: images of one are drawn together
        weights = (
            rng.multinomial(part.shape[1], counts / counts.sum(), size=replicates) / part.shape[1]
        )
        share = float(part.shape[1]) if members is None else 1.0
        exact += share * part.mean(1)
        replicated += share * (weights @ patterns.mean(1))
        total += share
    return _interval(exact / total, replicated / total, rng)


def paired_f1_interval(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, *, replicates: int = 2000
) -> Interval:
    """How much higher the macro F1 of `first` is than that of `second`, both predicted labels, int `[seeds, images]`.

    Macro F1 is over the labels that are present; the bootstrap draws as in `paired_interval`. Raises ValueError for arrays of
    different shape.
    """
    if first.shape != second.shape or first.shape[1] != len(labels):
        raise ValueError(
            f"paired figures of {first.shape} and {second.shape} over {len(labels)} images do not match."
        )
    rng = np.random.default_rng(derive_seed("paired-f1-interval", 0))
    seeds, size = len(first), int(max(first.max(), second.max(), labels.max())) + 1
    both = np.concatenate([first, second])
    present, counts = np.unique(labels, return_counts=True)
    # of each arm and replicate, the last of which is the data themselves: images of a class that are found, images called by its name
    hits, called = np.zeros((2, len(both), replicates + 1, size))
    for label, count in zip(present, counts, strict=True):
        patterns, times = np.unique(both[:, labels == label], axis=1, return_counts=True)
        weights = np.concatenate(
            [rng.multinomial(count, times / count, size=replicates), times[None]]
        )
        for arm, names in enumerate(patterns):
            by_name = weights @ np.eye(size)[names]
            hits[arm, :, label] = by_name[:, label]
            called[arm] += by_name
    scores = (2 * hits[..., present] / (called[..., present] + counts)).mean(2)
    gains = (scores[:seeds] - scores[seeds:]).T  # [replicates + 1, seeds]
    return _interval(gains[-1], gains[:-1].mean(1), rng)


def mean_std(figures: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for a single figure), in per cent."""
    values = 100 * np.asarray(figures, np.float64)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


def as_cells(entries: Sequence[Entry], columns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table as texts; a column that no entry has is left out, a figure that is absent is a dash."""
    columns = [name for name in columns if any(name in entry.figures for entry in entries)]
    compared = [name for name in columns if any(name in entry.intervals for entry in entries)]
    costs = list(dict.fromkeys(name for entry in entries for name in entry.costs))
    published = [name for name in columns if any(name in entry.published for entry in entries)]
    heading = [
        "method",
        *columns,
        *(f"{name}, difference [95 %]" for name in compared),
        *costs,
        *(f"{name}, published" for name in published),
    ]
    rows = []
    for entry in entries:
        row = [entry.name]
        row += [_figure(entry.figures.get(name)) for name in columns]
        for name in compared:
            each = entry.intervals.get(name)
            row.append(
                "–"
                if each is None
                else f"{each.difference:+.1f} [{each.low:+.1f}, {each.high:+.1f}]"
            )
        row += [f"{entry.costs[name]:,.0f}" if name in entry.costs else "–" for name in costs]
        row += [
            f"{entry.published[name]:.1f}" if name in entry.published else "–" for name in published
        ]
        rows.append(row)
    return heading, rows


def as_markdown(entries: Sequence[Entry], columns: Sequence[str]) -> str:
    """The table in Markdown."""
    heading, rows = as_cells(entries, columns)
    lines = [
        [for_markdown(text) for text in heading],
        ["---", *["---:"] * (len(heading) - 1)],
        *([for_markdown(name), *figures] for name, *figures in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_latex(entries: Sequence[Entry], columns: Sequence[str]) -> str:
    """The table as a LaTeX `tabular` of the booktabs package."""
    heading, rows = as_cells(entries, columns)
    lines = [
        r"\begin{tabular}{l" + "r" * (len(heading) - 1) + "}",
        r"\toprule",
        _latex_line(heading),
        r"\midrule",
    ]
    return "\n".join([*lines, *map(_latex_line, rows), r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_csv(entries: Sequence[Entry], columns: Sequence[str], seeds: Sequence[int]) -> str:
    """One line per method and seed with the raw figures in [0, 1], for whoever wants to compute on them."""
    columns = [name for name in columns if any(name in entry.figures for entry in entries)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "seed", *map(for_csv, columns)])
    for entry in entries:
        for place, seed in enumerate(seeds):
            writer.writerow(
                [
                    for_csv(entry.name),
                    seed,
                    *(
                        f"{entry.figures[name][place]:.6f}" if name in entry.figures else ""
                        for name in columns
                    ),
                ]
            )
    return out.getvalue()


def _figure(figures: Sequence[float] | None) -> str:
    if not figures:
        return "–"
    mean, std = mean_std(figures)
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(map(for_latex, cells)) + r" \\"
