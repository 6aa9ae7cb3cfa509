"""`discl data check`: counts, sizes and every problem at once."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..data import ImageTable, Inspection, class_groups, inspect_images, settle_depth
from ..data.readers import format_of, too_few_classes
from ..errors import DataError
from ..escaping import one_line
from ..recipe import Data, Groups
from ..run_folder.run import read_data
from ..utils.console import progress
from .prepare_data import depth_told, long_tail_rows, own_parts, units_of, unused_splits

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
"""Format: classes, and images in each split, of the set that is laid out so."""
CIFAR100_LT = {100: 10_847, 50: 12_608, 10: 19_573}
CIFAR_TEST = 10_000
NO_NAME = re.compile(r"\d+|n\d{8}")
"""A class that has its label or, in ImageNet, its WordNet id for a name."""
SHOWN = 8
SHOWN_UNREADABLE = 20


@dataclass(frozen=True)
class Finding:
    """A problem; a fatal one would stop a run."""

    fatal: bool
    text: str


@dataclass(frozen=True)
class SplitCheck:
    """What a split holds: readable images, those of each class (int64 `[classes]`), width and height of each, domains.

    `own`: the split is not given, `data.own_split` takes it from the training images.
    """

    rows: int
    class_counts: np.ndarray
    sizes: np.ndarray
    domains: int
    own: bool = False


@dataclass(frozen=True)
class Check:
    """Splits by name, class names, and all findings, the fatal ones first."""

    splits: dict[str, SplitCheck]
    class_names: tuple[str, ...]
    findings: list[Finding]

    @property
    def fatal(self) -> bool:
        return any(finding.fatal for finding in self.findings)


def check_data(data: Data) -> Check:
    """Reads, decodes and compares everything that the section `data` of a recipe names, divided as a run would; writes nothing.

    Raises DataError only where nothing can be read at all.
    """
    findings: list[Finding] = []

    def on_unused(names: list[str]) -> None:
        findings.append(Finding(False, unused_splits(names)))

    tables = read_data(data, on_unused, lambda told: findings.append(Finding(False, told)))
    given = set(tables)
    seen: dict[str, Inspection] = {}
    for split, table in tables.items():
        with progress(f"check {split} images", len(table)) as advance:
            seen[split] = inspect_images(table, advance)
        findings += _unreadable(split, seen[split], data.unreadable == "error")
    tables, seen = settle_depth(tables, seen, data.bits)
    if told := depth_told(tables, seen):
        findings.append(Finding(False, f"{told}."))
    for split, table in tables.items():
        broken = {row for row, _ in seen[split].unreadable}
        readable = [row for row in range(len(table)) if row not in broken]
        tables[split], seen[split] = table.select(readable), seen[split].select(readable)
    _divide(data, tables, seen)
    if data.long_tail:
        try:
            rows = long_tail_rows(tables["train"], seen["train"].digests, data.long_tail)
            tables["train"], seen["train"] = (
                tables["train"].select(rows),
                seen["train"].select(rows),
            )
        except DataError as error:
            findings.append(Finding(True, str(error)))
    splits = {
        split: _look(table, seen[split], split not in given) for split, table in tables.items()
    }
    names = tables["train"].class_names
    findings += _copies(seen, tables, data.overlap == "error") + _classes(splits, names)
    findings += _published(data, {split: check.rows for split, check in splits.items()}, len(names))
    if told := too_few_classes(data.root, names):
        findings.append(Finding(True, told))
    if len(tables) == 1:
        findings.append(
            Finding(
                True,
                "there is neither a validation nor a test split; set data.own_split or name them in data.splits.",
            )
        )
    return Check(splits, names, sorted(findings, key=lambda finding: not finding.fatal))


def _unreadable(split: str, seen: Inspection, fatal: bool) -> list[Finding]:
    findings = [
        Finding(fatal, f"{split}: {problem}") for _, problem in seen.unreadable[:SHOWN_UNREADABLE]
    ]
    if (more := len(seen.unreadable) - SHOWN_UNREADABLE) > 0:
        findings.append(Finding(fatal, f"{split}: {more:,} more images cannot be read."))
    return findings


def _divide(data: Data, tables: dict[str, ImageTable], seen: dict[str, Inspection]) -> None:
    """Takes the splits that are not given from the training images, as a run does."""
    train, found = tables["train"], seen["train"]
    if not len(train):
        return
    parts = own_parts(
        train.ids,
        train.labels.tolist(),
        units_of(train, found.digests),
        data.own_split,
        list(tables),
    )
    for split, rows in parts.items():
        tables[split], seen[split] = train.select(rows), found.select(rows)


def _look(table: ImageTable, seen: Inspection, own: bool) -> SplitCheck:
    sizes = np.asarray(seen.sizes, np.int64).reshape(-1, 2)
    domains = len(set(table.rows["domain"][:])) if "domain" in table.rows.column_names else 0
    return SplitCheck(len(table), table.class_counts, sizes, domains, own)


def describe_check(check: Check, groups: Groups) -> str:
    """The check as text: a table of the splits, then the findings."""
    lines = [
        f"{'split':<16}{'images':>10}{'classes':>9}{'per class':>14}{'width × height, median':>26}{'domains':>9}"
    ]
    for split, each in check.splits.items():
        present = each.class_counts[each.class_counts > 0]
        spread = f"{present.min()} … {present.max()}" if len(present) else "–"
        sizes = "–"
        if len(each.sizes):
            low, middle, high = (
                each.sizes.min(0),
                np.median(each.sizes, 0).astype(int),
                each.sizes.max(0),
            )
            sizes = f"{middle[0]} × {middle[1]}" + (
                "" if (low == high).all() else f" ({each.sizes.min()} … {each.sizes.max()})"
            )
        lines.append(
            f"{one_line(split) + ' *' * each.own:<16}{each.rows:>10,}{len(present):>9,}{spread:>14}{sizes:>26}{each.domains or '–':>9}"
        )
    if any(each.own for each in check.splits.values()):
        lines.append("* taken from the training images, by data.own_split")
    members = class_groups(check.splits["train"].class_counts.tolist(), groups.many, groups.few)
    lines.append(
        f"{len(check.class_names)} classes: "
        + ", ".join(f"{len(labels)} {name}" for name, labels in members.items())
    )
    lines += [
        f"{'error' if finding.fatal else 'note'}: {one_line(finding.text)}"
        for finding in check.findings
    ]
    return "\n".join(lines if check.findings else [*lines, "no problem found"])


def _copies(
    seen: dict[str, Inspection], tables: dict[str, ImageTable], fatal: bool
) -> list[Finding]:
    """Pictures that stand in two splits, twice in one, or under two labels."""
    ids = {split: table.ids for split, table in tables.items()}
    labels = {split: table.labels.tolist() for split, table in tables.items()}
    place = {
        split: {content: row for row, content in reversed(list(enumerate(found.digests)))}
        for split, found in seen.items()
    }
    findings = []
    for first, second in combinations(seen, 2):
        shared = [content for content in place[first] if content in place[second]]
        if shared:
            one, two = (ids[split][place[split][shared[0]]] for split in (first, second))
            told = f"{len(shared)} pictures lie in {first} and in {second}, by content (for example '{one}' is '{two}')."
            findings.append(Finding(fatal, told))
    for split, found in seen.items():
        twice = sum(count - 1 for count in Counter(found.digests).values() if count > 1)
        if twice:
            findings.append(
                Finding(False, f"{twice} images of {split} are copies of another one in it.")
            )
    first_of: dict[str, tuple[str, int]] = {}
    torn: dict[str, tuple[str, int]] = {}
    for split, found in seen.items():
        for row, content in enumerate(found.digests):
            kept, number = first_of.setdefault(content, (split, row))
            if labels[kept][number] != labels[split][row]:
                torn.setdefault(content, (split, row))
    if torn:
        content, other = next(iter(torn.items()))
        names = tables["train"].class_names
        one, two = (
            f"'{ids[split][row]}' as {names[labels[split][row]]}"
            for split, row in (first_of[content], other)
        )
        findings.append(
            Finding(
                False,
                f"{len(torn)} pictures have copies under another label (for example {one} and {two}).",
            )
        )
    return findings


def _classes(splits: dict[str, SplitCheck], names: tuple[str, ...]) -> list[Finding]:
    findings = []
    for split, check in splits.items():
        lacking = [name for name, count in zip(names, check.class_counts, strict=True) if not count]
        if lacking:
            told = ", ".join(lacking[:SHOWN]) + (
                f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
            )
            findings.append(
                Finding(
                    split == "train",
                    f"{len(lacking)} classes have no image in {split}: {told}."
                    + " data.drop_empty_classes: true leaves them out." * (split == "train"),
                )
            )
    bare = [name for name in names if NO_NAME.fullmatch(name)]
    if bare:
        told = f"{len(bare)} of {len(names)} labels have a number for a name ({', '.join(bare[:SHOWN])}{', …' * (len(bare) > SHOWN)})"
        findings.append(
            Finding(
                False,
                f"{told}, which texts cannot use; add the file of names that the format has, or give prompts.names.",
            )
        )
    return findings


def _published(data: Data, rows: dict[str, int], classes: int) -> list[Finding]:
    """What differs from the known set that is laid out in this format, or from CIFAR100-LT."""
    kind = format_of(data.root, data.format)
    known, expected = PUBLISHED.get(kind, (classes, {})) if not data.files else (classes, {})
    profile = data.long_tail
    if kind == "cifar" and classes == 100 and not profile:
        expected = {"train": 50_000, "test": CIFAR_TEST}
    if (
        classes == 100
        and profile
        and profile.n_max == 500
        and profile.imbalance_ratio in CIFAR100_LT
    ):
        expected = {"train": CIFAR100_LT[int(profile.imbalance_ratio)], "test": CIFAR_TEST}
    if known != classes:
        return [
            Finding(
                False,
                f"there are {classes:,} classes; {kind} as published has {known:,}: another version, or a part of it.",
            )
        ]
    return [
        Finding(False, f"{split} has {rows[split]:,} images; {count:,} are published.")
        for split, count in expected.items()
        if split in rows and rows[split] != count
    ]
