"""`discl data check`: counts, sizes and every problem at once."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..audit.limits import Limits
from ..data import ImageTable, Inspection, class_groups, inspect_images, settle_depth
from ..data.readers import format_of, too_few_classes
from ..errors import DataError
from ..escaping import one_line
from ..recipe import Data, Groups
from ..run_folder.run import read_data
from ..utils.console import progress
from ..utils.counts import count_be, count_have, count_of, list_some
from .prepare_data import describe_depth, long_tail_rows, own_parts, units_of, unused_splits
from .quick_audit import MOST_COMPARED, QuickAudit

PUBLISHED: dict[str, tuple[int, dict[str, int]]] = {
    "imagenet-lt": (1000, {"train": 115_846, "validation": 20_000, "test": 50_000}),
    "inaturalist": (8142, {"train": 437_513, "validation": 24_426, "test": 24_426}),
    "wilds": (
        182,
        {
            "train": 129_809,
            "validation-ood": 14_961,
            "test-ood": 42_791,
            "validation": 7_314,
            "test": 8_154,
        },
    ),
}
"""Format: classes, and images in each split, of the published set that uses it."""
CIFAR100_LT = {100: 10_847, 50: 12_608, 10: 19_573}
"""Imbalance ratio: training images."""
CIFAR_TEST = 10_000
NO_NAME = re.compile(r"\d+|n\d{8}")
"""A class that has its label or, in ImageNet, its WordNet id for a name."""
SHOWN = 8
"""Classes that the text of a problem lists."""
SHOWN_UNREADABLE = 20
"""Unreadable images of a split that are listed."""


@dataclass(frozen=True)
class Problem:
    """A problem; a fatal one would stop a run."""

    fatal: bool
    text: str


@dataclass(frozen=True)
class SplitCheck:
    """What a split holds.

    - `rows`: number of readable images.
    - `class_counts`: readable images of each class, int64 `[classes]`.
    - `sizes`: width and height of each image in pixels, int64 `[images, 2]`.
    - `domains`: number of domains; 0 if the data set states none.
    - `own`: whether `data.own_split` takes the split from the training images.
    """

    rows: int
    class_counts: np.ndarray
    sizes: np.ndarray
    domains: int
    own: bool = False


@dataclass(frozen=True)
class Check:
    """Splits by name, class names, and all problems, the fatal ones first."""

    splits: dict[str, SplitCheck]
    class_names: tuple[str, ...]
    problems: list[Problem]

    @property
    def fatal(self) -> bool:
        """Whether a problem is fatal."""
        return any(problem.fatal for problem in self.problems)


def check_data(data: Data, limits: Limits | None = None) -> Check:
    """Reads, decodes and compares the images of a recipe's section `data`; writes nothing.

    They are divided into splits as a run divides them. Raises DataError only if nothing can be
    read at all.

    - `limits`: when an image is too dark, blurred and so on; default those of `discl audit`.
    """
    limits = limits or Limits()
    problems: list[Problem] = []

    def note(message: str) -> None:
        problems.append(Problem(False, message))

    tables = read_data(data, lambda names: note(unused_splits(names)), note)
    given = set(tables)
    seen: dict[str, Inspection] = {}
    audited = QuickAudit(sum(map(len, tables.values())) <= MOST_COMPARED)
    for split, table in tables.items():
        with progress(f"check {split} images", len(table)) as advance:
            seen[split] = inspect_images(table, advance, audited.add)
        problems += _unreadable(split, seen[split], data.unreadable == "error")
    tables, seen = settle_depth(tables, seen, data.bits)
    if message := describe_depth(tables, seen):
        note(f"{message}.")
    for split, table in tables.items():
        broken = {row for row, _ in seen[split].unreadable}
        readable = [row for row in range(len(table)) if row not in broken]
        tables[split], seen[split] = table.select(readable), seen[split].select(readable)
    _divide(data, tables, seen)
    if data.long_tail:
        try:
            rows = long_tail_rows(tables["train"], seen["train"].digests, data.long_tail)
        except DataError as error:
            problems.append(Problem(True, str(error)))
        else:
            tables["train"] = tables["train"].select(rows)
            seen["train"] = seen["train"].select(rows)
    splits = {
        split: _look(table, seen[split], split not in given) for split, table in tables.items()
    }
    names = tables["train"].class_names
    problems += _copies(seen, tables, data.overlap == "error") + _classes(splits, names)
    problems += _published(data, {split: check.rows for split, check in splits.items()}, len(names))
    problems += [Problem(False, f"{text}.") for text in audited.describe(tables, seen, limits)]
    if problem := too_few_classes(data.root, names):
        problems.append(Problem(True, problem))
    if len(tables) == 1:
        problem = (
            "there is neither a validation nor a test split; set data.own_split or name them in "
            "data.splits."
        )
        problems.append(Problem(True, problem))
    return Check(splits, names, sorted(problems, key=lambda problem: not problem.fatal))


def _unreadable(split: str, seen: Inspection, fatal: bool) -> list[Problem]:
    texts = [f"{split}: {problem}" for _, problem in seen.unreadable[:SHOWN_UNREADABLE]]
    if (more := len(seen.unreadable) - SHOWN_UNREADABLE) > 0:
        texts.append(f"{split}: {count_of(more, 'more image')} cannot be read.")
    return [Problem(fatal, text) for text in texts]


def _divide(data: Data, tables: dict[str, ImageTable], seen: dict[str, Inspection]) -> None:
    """Takes the splits that are not given from the training images, as a run does."""
    train, inspected = tables["train"], seen["train"]
    if not len(train):
        return
    units = units_of(train, inspected.digests)
    labels = train.labels.tolist()
    parts = own_parts(train.ids, labels, units, data.own_split, given=list(tables))
    for split, rows in parts.items():
        tables[split], seen[split] = train.select(rows), inspected.select(rows)


def _look(table: ImageTable, seen: Inspection, own: bool) -> SplitCheck:
    sizes = np.asarray(seen.sizes, np.int64).reshape(-1, 2)
    domains = len(set(table.rows["domain"][:])) if "domain" in table.rows.column_names else 0
    return SplitCheck(len(table), table.class_counts, sizes, domains, own)


def describe_check(check: Check, groups: Groups) -> str:
    """The check as text: a table of the splits, then the problems."""
    heading = f"{'split':<16}{'images':>10}{'classes':>9}{'per class':>14}"
    lines = [f"{heading}{'width × height, median':>26}{'domains':>9}"]
    lines += [_describe_split(split, each) for split, each in check.splits.items()]
    if any(each.own for each in check.splits.values()):
        lines.append("* taken from the training images, by data.own_split")
    members = class_groups(check.splits["train"].class_counts.tolist(), groups.many, groups.few)
    sizes = ", ".join(f"{len(labels)} {name}" for name, labels in members.items())
    lines.append(f"{count_of(len(check.class_names), 'class', 'classes')}: {sizes}")
    lines += [
        f"{'error' if problem.fatal else 'note'}: {one_line(problem.text)}"
        for problem in check.problems
    ]
    return "\n".join(lines if check.problems else [*lines, "no problem found"])


def _describe_split(name: str, split: SplitCheck) -> str:
    present = split.class_counts[split.class_counts > 0]
    spread = f"{present.min()} … {present.max()}" if len(present) else "–"
    sizes = "–"
    if len(split.sizes):
        width, height = np.median(split.sizes, 0).astype(int)
        sizes = f"{width} × {height}"
        if (split.sizes != split.sizes[0]).any():
            sizes += f" ({split.sizes.min()} … {split.sizes.max()})"
    title = one_line(name) + " *" * split.own
    counts = f"{title:<16}{split.rows:>10,}{len(present):>9,}{spread:>14}"
    return f"{counts}{sizes:>26}{split.domains or '–':>9}"


def _copies(
    seen: dict[str, Inspection], tables: dict[str, ImageTable], fatal: bool
) -> list[Problem]:
    """Pictures that are in two splits, twice in one, or under two labels."""
    ids = {split: table.ids for split, table in tables.items()}
    row_of = {
        split: {content: row for row, content in reversed(list(enumerate(inspection.digests)))}
        for split, inspection in seen.items()
    }
    problems = []
    for first, second in combinations(seen, 2):
        shared = [content for content in row_of[first] if content in row_of[second]]
        if shared:
            one, two = (ids[split][row_of[split][shared[0]]] for split in (first, second))
            text = (
                f"{count_be(len(shared), 'picture')} in {first} and in {second}, by content (for "
                f"example '{one}' is '{two}')."
            )
            problems.append(Problem(fatal, text))
    for split, inspection in seen.items():
        copies = sum(count - 1 for count in Counter(inspection.digests).values() if count > 1)
        if copies:
            text = f"{split} holds {count_of(copies, 'copy', 'copies')} of its own images."
            problems.append(Problem(False, text))
    return problems + _relabelled(seen, tables)


def _relabelled(seen: dict[str, Inspection], tables: dict[str, ImageTable]) -> list[Problem]:
    """Pictures that are under two labels."""
    labels = {split: table.labels.tolist() for split, table in tables.items()}
    first_of: dict[str, tuple[str, int]] = {}
    differing: dict[str, tuple[str, int]] = {}
    for split, inspection in seen.items():
        for row, content in enumerate(inspection.digests):
            first, first_row = first_of.setdefault(content, (split, row))
            if labels[first][first_row] != labels[split][row]:
                differing.setdefault(content, (split, row))
    if not differing:
        return []
    content, other = next(iter(differing.items()))
    names = tables["train"].class_names
    one, two = (
        f"'{tables[split].ids[row]}' as {names[labels[split][row]]}"
        for split, row in (first_of[content], other)
    )
    number = count_have(len(differing), "picture")
    text = f"{number} copies under another label (for example {one} and {two})."
    return [Problem(False, text)]


def _classes(splits: dict[str, SplitCheck], names: tuple[str, ...]) -> list[Problem]:
    """Classes without images, and those that texts cannot name."""
    problems = []
    for split, check in splits.items():
        empty = [name for name, count in zip(names, check.class_counts, strict=True) if not count]
        if empty:
            number = count_have(len(empty), "class", "classes")
            text = f"{number} no image in {split}: {list_some(empty, SHOWN)}."
            if split == "train":
                text += " data.drop_empty_classes: true leaves them out."
            problems.append(Problem(split == "train", text))
    bare = [name for name in names if NO_NAME.fullmatch(name)]
    if bare:
        text = (
            f"{len(bare)} of {count_of(len(names), 'label')} have a number for a name "
            f"({list_some(bare, SHOWN)}), which texts cannot use; add the file of names that the "
            "format has, or set prompts.names."
        )
        problems.append(Problem(False, text))
    return problems


def _published(data: Data, rows: dict[str, int], classes: int) -> list[Problem]:
    """Differences from the known data set of this format, or from CIFAR100-LT."""
    kind = format_of(data.root, data.format)
    known, expected = PUBLISHED.get(kind, (classes, {})) if not data.files else (classes, {})
    tail = data.long_tail
    if kind == "cifar" and classes == 100 and not tail:
        expected = {"train": 50_000, "test": CIFAR_TEST}
    if classes == 100 and tail and tail.n_max == 500 and tail.imbalance_ratio in CIFAR100_LT:
        expected = {"train": CIFAR100_LT[int(tail.imbalance_ratio)], "test": CIFAR_TEST}
    if known != classes:
        text = (
            f"the data set has {count_of(classes, 'class', 'classes')}; {kind} as published has "
            f"{known:,}: another version, or a part of it."
        )
        return [Problem(False, text)]
    return [
        Problem(False, f"{split} has {rows[split]:,} images; {count:,} are published.")
        for split, count in expected.items()
        if split in rows and rows[split] != count
    ]
