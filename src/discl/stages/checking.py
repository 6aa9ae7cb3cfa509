"""A look at a data set before anything is made from it: counts, sizes, and every problem at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..console import progress
from ..data import Inspection, class_groups, inspect_images
from ..recipe import Data, Groups
from ..workspace import read_data
from .data import long_tail_rows, unused_splits

PUBLISHED = {
    ("imagenet-lt", 1000): {"train": 115_846, "validation": 20_000, "test": 50_000},
    ("inaturalist", 8142): {"train": 437_513, "validation": 24_426, "test": 24_426},
    ("wilds", 182): {"train": 129_809, "validation-ood": 14_961, "test-ood": 42_791, "validation": 7_314, "test": 8_154},
}
CIFAR100_LT = {100: 10_847, 50: 12_608, 10: 19_573}
SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """A problem; a fatal one would stop a run."""

    fatal: bool
    text: str


@dataclass(frozen=True)
class SplitCheck:
    """What a split holds: rows, rows of each class (int64 `[classes]`), width and height of each readable image, domains."""

    rows: int
    class_counts: np.ndarray
    sizes: np.ndarray
    domains: int


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
    """Reads, decodes and compares everything that the section `data` of a recipe names; writes nothing.

    Raises DataError only where nothing can be read at all.
    """
    findings: list[Finding] = []

    def on_unused(names: list[str]) -> None:
        findings.append(Finding(False, unused_splits(names)))

    tables = read_data(data, on_unused)
    splits: dict[str, SplitCheck] = {}
    seen: dict[str, Inspection] = {}
    for split, table in tables.items():
        with progress(f"check {split} images", len(table)) as advance:
            seen[split] = inspect_images(table, advance)
        for _, problem in seen[split].unreadable:
            findings.append(Finding(data.unreadable == "error", f"{split}: {problem}"))
        if data.long_tail and split == "train":
            rows = long_tail_rows(table, seen[split].digests, data.long_tail)
            tables[split], seen[split] = table.select(rows), seen[split].select(rows)
        sizes = np.asarray([size for size in seen[split].sizes if size[0]], np.int64).reshape(-1, 2)
        domains = len(set(table.rows["domain"][:])) if "domain" in table.rows.column_names else 0
        splits[split] = SplitCheck(len(tables[split]), tables[split].class_counts, sizes, domains)
    ids = {split: table.ids for split, table in tables.items()}
    findings += _copies(seen, ids, data.overlap == "error") + _classes(splits, tables["train"].class_names)
    findings += _published(data, {split: check.rows for split, check in splits.items()}, len(tables["train"].class_names))
    if len(tables) == 1 and not data.own_split.validation and not data.own_split.test:
        findings.append(Finding(True, "there is neither a validation nor a test split; set data.own_split or name them in data.splits."))
    return Check(splits, tables["train"].class_names, sorted(findings, key=lambda finding: not finding.fatal))


def describe_check(check: Check, groups: Groups) -> str:
    """The check as text: a table of the splits, then the findings."""
    lines = [f"{'split':<16}{'images':>10}{'classes':>9}{'per class':>14}{'width × height, median':>26}{'domains':>9}"]
    for split, each in check.splits.items():
        present = each.class_counts[each.class_counts > 0]
        spread = f"{present.min()} … {present.max()}" if len(present) else "–"
        sizes = "–"
        if len(each.sizes):
            low, middle, high = each.sizes.min(0), np.median(each.sizes, 0).astype(int), each.sizes.max(0)
            sizes = f"{middle[0]} × {middle[1]}" + ("" if (low == high).all() else f" ({each.sizes.min()} … {each.sizes.max()})")
        lines.append(f"{split:<16}{each.rows:>10,}{len(present):>9,}{spread:>14}{sizes:>26}{each.domains or '–':>9}")
    members = class_groups(check.splits["train"].class_counts.tolist(), groups.many, groups.few)
    lines.append(f"{len(check.class_names)} classes: " + ", ".join(f"{len(labels)} {name}" for name, labels in members.items()))
    lines += [f"{'error' if finding.fatal else 'note'}: {finding.text}" for finding in check.findings]
    return "\n".join(lines if check.findings else [*lines, "no problem found"])


def _copies(seen: dict[str, Inspection], ids: dict[str, list[str]], fatal: bool) -> list[Finding]:
    """Pictures that stand in two splits, or twice in one."""
    place = {
        split: {content: ids[split][row] for row, content in reversed(list(enumerate(found.digests))) if content}
        for split, found in seen.items()
    }
    findings = []
    for first, second in combinations(seen, 2):
        shared = [content for content in place[first] if content in place[second]]
        if shared:
            example = f"'{place[first][shared[0]]}' is '{place[second][shared[0]]}'"
            findings.append(Finding(fatal, f"{len(shared)} pictures lie in {first} and in {second}, by content (for example {example})."))
    for split, found in seen.items():
        twice = sum(count - 1 for content, count in Counter(found.digests).items() if content and count > 1)
        if twice:
            findings.append(Finding(False, f"{twice} images of {split} are copies of another one in it."))
    return findings


def _classes(splits: dict[str, SplitCheck], names: tuple[str, ...]) -> list[Finding]:
    findings = []
    for split, check in splits.items():
        lacking = [name for name, count in zip(names, check.class_counts, strict=True) if not count]
        if lacking:
            told = ", ".join(lacking[:SHOWN]) + (f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else "")
            findings.append(Finding(split == "train", f"{len(lacking)} classes have no image in {split}: {told}."))
    if all(name == str(label) for label, name in enumerate(names)):
        findings.append(
            Finding(False, "the classes have numbers for names, which prompts cannot use; give prompts.names or another format.")
        )
    return findings


def _published(data: Data, rows: dict[str, int], classes: int) -> list[Finding]:
    """Counts that differ from those of the known set with this format and number of classes."""
    expected = dict(PUBLISHED.get((data.format, classes), {}))
    profile = data.long_tail
    if classes == 100 and profile and profile.n_max == 500 and profile.imbalance_ratio in CIFAR100_LT:
        expected = {"train": CIFAR100_LT[int(profile.imbalance_ratio)], "test": 10_000}
    return [
        Finding(False, f"{split} has {rows[split]:,} images; {count:,} are published.")
        for split, count in expected.items()
        if split in rows and rows[split] != count
    ]
