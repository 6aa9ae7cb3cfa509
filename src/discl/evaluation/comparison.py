"""Methods × seeds: mean ± std, paired intervals.

Input are plain numbers: metrics of each seed, and correct or wrong predictions of each image.
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
    """A difference and its bootstrap interval, in percentage points."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    - `name`: of the method.
    - `figures`: `{column: values of the seeds}` in [0, 1].
    - `intervals`: `{column: difference from the baseline}`.
    - `costs`: `{name: value}`.
    - `published`: `{column: per cent}`.
    - `controls`: `{heading: difference from a control}`, None without one.
    """

    name: str
    figures: Mapping[str, Sequence[float]]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    controls: Mapping[str, Interval | None] = field(default_factory=dict)


ENDS = (0.025, 0.975)
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The quantile .975 of Student's t with 1 to 9 degrees of freedom."""


def stretch(seeds: int) -> float:
    """Factor by which a bootstrap over n seeds is too narrow: t_{n−1} / z · √(n / (n − 1)) at .975.

    A mean over n draws with replacement varies with n instead of n − 1, and its percentiles are
    normal instead of Student's t (arXiv 1411.5279). The factor is 2.69 for three seeds, 1.58 for
    five, 1.22 for ten, and 1 for one seed.
    """
    if seeds == 1:
        return 1.0
    free, z = seeds - 1, 1.95996
    t = (
        STUDENT[free - 1] if free <= len(STUDENT) else z + 2.3723 / free + 2.8226 / free**2
    )  # Cornish and Fisher
    return float(t / z * np.sqrt(seeds / free))


def _interval(gains: np.ndarray, replicated: np.ndarray, rng: np.random.Generator) -> Interval:
    """The interval of the mean of `gains`, with drawn seeds whose deviations are `stretch`ed.

    - `gains`: `[seeds]`.
    - `replicated`: their mean on drawn images, `[replicates]`.
    """
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
    """Difference in accuracy of two methods on the same images and seeds; None without an image.

    The percentile bootstrap draws images within each class, the same for all seeds and both
    methods. It also draws seeds, whose deviations are `stretch`ed because seeds are few. With one
    seed the interval covers images only.

    - `first`, `second`: correct predictions, bool `[seeds, images]`.
    - `labels`: `[images]`.
    - `members`: labels whose class accuracies are averaged; default accuracy over all images.
    - `replicates`: bootstrap draws, 1 or more.

    Raises ValueError for arrays of different shape.
    """
    if first.shape != second.shape or first.shape[1] != len(labels):
        raise ValueError(
            f"shapes {first.shape} and {second.shape} do not match {len(labels)} images."
        )
    classes = np.unique(labels) if members is None else np.intersect1d(members, labels)
    if not len(classes):
        return None
    rng = np.random.default_rng(derive_seed("paired-interval", 0))
    gain = first.astype(np.int8) - second.astype(np.int8)
    exact, replicated, total = np.zeros(len(gain)), np.zeros(replicates), 0.0
    for label in classes:
        part = gain[:, labels == label]
        # there are few distinct outcomes, and images of one outcome are drawn together
        patterns, counts = np.unique(part.T, axis=0, return_counts=True)
        images = part.shape[1]
        drawn = rng.multinomial(images, counts / counts.sum(), size=replicates) / images
        weight = float(images) if members is None else 1.0
        exact += weight * part.mean(1)
        replicated += weight * (drawn @ patterns.mean(1))
        total += weight
    return _interval(exact / total, replicated / total, rng)


def paired_f1_interval(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, *, replicates: int = 2000
) -> Interval:
    """Difference in macro F1 of two methods, over the labels that are present.

    The bootstrap draws as in `paired_interval`.

    - `first`, `second`: predicted labels, int `[seeds, images]`.
    - `labels`: `[images]`.
    - `replicates`: bootstrap draws, 1 or more.

    Raises ValueError for arrays of different shape.
    """
    if first.shape != second.shape or first.shape[1] != len(labels):
        raise ValueError(
            f"shapes {first.shape} and {second.shape} do not match {len(labels)} images."
        )
    rng = np.random.default_rng(derive_seed("paired-f1-interval", 0))
    seeds, size = len(first), int(max(first.max(), second.max(), labels.max())) + 1
    both = np.concatenate([first, second])
    present, counts = np.unique(labels, return_counts=True)
    # per method, seed and replicate: correct images and predictions of each class; the last
    # replicate is the data
    hits, called = np.zeros((2, len(both), replicates + 1, size))
    for label, count in zip(present, counts, strict=True):
        patterns, times = np.unique(both[:, labels == label], axis=1, return_counts=True)
        weights = np.concatenate(
            [rng.multinomial(count, times / count, size=replicates), times[None]]
        )
        for row, names in enumerate(patterns):
            by_name = weights @ np.eye(size)[names]
            hits[row, :, label] = by_name[:, label]
            called[row] += by_name
    scores = (2 * hits[..., present] / (called[..., present] + counts)).mean(2)
    gains = (scores[:seeds] - scores[seeds:]).T  # [replicates + 1, seeds]
    return _interval(gains[-1], gains[:-1].mean(1), rng)


def mean_std(figures: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for a single figure), in per cent."""
    values = 100 * np.asarray(figures, np.float64)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


INTERVAL = " [95 %]"
DIFFERENCE = f", difference{INTERVAL}"
"""Ends of the headings of a difference with its interval, and of that from the baseline."""
MISSING = "–"


def as_cells(entries: Sequence[Entry], columns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table as texts.

    Columns without a value are left out. A missing value is a dash.
    """
    columns = [name for name in columns if any(name in entry.figures for entry in entries)]
    compared = [name for name in columns if any(name in entry.intervals for entry in entries)]
    controls = list(dict.fromkeys(name for entry in entries for name in entry.controls))
    costs = list(dict.fromkeys(name for entry in entries for name in entry.costs))
    published = [name for name in columns if any(name in entry.published for entry in entries)]
    heading = [
        "method",
        *columns,
        *(f"{name}{DIFFERENCE}" for name in compared),
        *(f"{name}{INTERVAL}" for name in controls),
        *costs,
        *(f"{name}, published" for name in published),
    ]
    rows = []
    for entry in entries:
        row = [entry.name]
        row += [_figure(entry.figures.get(name)) for name in columns]
        for name in compared:
            row.append(_interval_cell(entry.intervals.get(name)))
        row += [_interval_cell(entry.controls.get(name)) for name in controls]
        row += [f"{entry.costs[name]:,.0f}" if name in entry.costs else MISSING for name in costs]
        row += [
            f"{entry.published[name]:.1f}" if name in entry.published else MISSING
            for name in published
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
    """The table as a LaTeX `tabular` with booktabs."""
    heading, rows = as_cells(entries, columns)
    lines = [
        r"\begin{tabular}{l" + "r" * (len(heading) - 1) + "}",
        r"\toprule",
        _latex_line(heading),
        r"\midrule",
    ]
    return "\n".join([*lines, *map(_latex_line, rows), r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_csv(entries: Sequence[Entry], columns: Sequence[str], seeds: Sequence[int]) -> str:
    """The values in [0, 1] as CSV, one line per method and seed."""
    columns = [name for name in columns if any(name in entry.figures for entry in entries)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "seed", *map(for_csv, columns)])
    for entry in entries:
        for index, seed in enumerate(seeds):
            cells = [
                f"{entry.figures[name][index]:.6f}" if name in entry.figures else ""
                for name in columns
            ]
            writer.writerow([for_csv(entry.name), seed, *cells])
    return out.getvalue()


def _figure(figures: Sequence[float] | None) -> str:
    if not figures:
        return MISSING
    mean, std = mean_std(figures)
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def _interval_cell(interval: Interval | None) -> str:
    if interval is None:
        return MISSING
    return f"{interval.difference:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(map(for_latex, cells)) + r" \\"
