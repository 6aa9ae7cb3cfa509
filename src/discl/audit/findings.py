"""Findings about images: copies, leakage, poor pictures, classes that collapse or wander off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from .copies import Copies, compare, find_copies
from .limits import Limits
from .measures import Measures
from .stack import Stack

SYNTHETIC = "synthetic"
"""Stands for a split where an image is synthetic."""
KINDS = {
    "leakage": "synthetic images that copy a validation or test image",
    "copies-another": "synthetic images that copy a training image that is not their source",
    "copies-source": "synthetic images of a low level that copy their source",
    "exact-duplicate": "images whose pixels occur before",
    "near-duplicate": "images that show the same picture as another (mirrored, cropped, "
    "compressed or noisy)",
    "unreadable": "images that cannot be decoded",
    "dark": "too dark",
    "bright": "too bright",
    "blurred": "blurred",
    "low-information": "nearly of one colour",
    "odd-aspect": "much wider than high, or higher than wide",
    "odd-size": "much smaller or larger than the others of the split",
    "grey": "grey among images of colour",
    "collapsed": "classes whose synthetic images cover little of the real ones",
    "wandered": "classes whose synthetic images are unlike the real ones",
}
"""Every kind of finding, in words, by severity."""
CANDIDATES_AMONG_REAL = 8
"""Most similar real images that a real one is aligned with."""
FEW = 10
"""Images that may count as copies in any set: true ones are often so many."""
HIGHEST_LIMIT = 0.97
"""To which the limit of copies rises where images look alike."""
NEIGHBOURS = 5
"""Of a class with fewer real or synthetic images nothing is said about its variety."""


@dataclass(frozen=True)
class Images:
    """Images of one split, or the synthetic ones.

    - `split`: its name, or `synthetic`.
    - `ids`: of the images; `contents`: digests of their pixels.
    - `labels`, `levels`: int64 `[images]`; real images have level 100.
    - `sources`: digest of the source's pixels, of synthetic images; empty for real ones.
    - `thumbnails`: uint8 `[images, 32, 32]`, mapped from a file where there may be many.
    - `sizes`: width and height in pixels, int64 `[images, 2]`.
    - `measures`: columns as in `Measures`, float32 `[images]` each.
    """

    split: str
    ids: Sequence[str]
    contents: Sequence[str]
    labels: np.ndarray
    levels: np.ndarray
    sources: Sequence[str]
    thumbnails: np.ndarray
    sizes: np.ndarray
    measures: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Finding:
    """One finding.

    - `kind`: a key of `KINDS`.
    - `split`, `id`, `label`, `level`: the image. A class has no id.
    - `other_split`, `other`: the image that it copies, if it copies one.
    - `value`: what was measured.
    """

    kind: str
    split: str
    id: str
    label: int
    level: int
    value: float = 0.0
    other_split: str = ""
    other: str = ""


def find_duplicates(
    parts: Sequence[Images],
    limits: Limits,
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[Finding]:
    """Exact and near duplicates among real images, within a split and across splits."""
    pixels = [(part, row) for part in parts for row in range(len(part))]
    findings = exact_duplicates(parts)
    first = sorted(
        {part.contents[row]: number for number, (part, row) in _last_first(pixels)}.values()
    )
    if len(first) < 2:
        return findings
    images = Stack([part.thumbnails for part in parts], np.asarray(first))
    numbers = np.arange(len(first))
    copies = find_copies(
        images,
        images,
        same_query=numbers,
        same_reference=numbers,
        threshold=limits.copies,
        candidates=CANDIDATES_AMONG_REAL,
        on_progress=on_progress,
    )
    best: dict[tuple[int, int], float] = {}
    for query, reference, similarity in _pairs(copies):
        pair = (max(query, reference), min(query, reference))
        best[pair] = max(best.get(pair, -1.0), similarity)
    for (later, earlier), similarity in sorted(best.items()):
        one, other = pixels[first[later]], pixels[first[earlier]]
        findings.append(_about(one, "near-duplicate", similarity, other))
    return findings


def judge_duplicates(
    parts: Sequence[Images],
    limits: Limits,
    on_progress: Callable[[int], None] = lambda count: None,
) -> tuple[list[Finding], Limits]:
    """(duplicates among real images, limits for them); see `find_duplicates` and `raise_limit`.

    Near duplicates below the raised limit are left out.
    """
    duplicates = find_duplicates(parts, limits, on_progress)
    raised = raise_limit(limits, duplicates, sum(map(len, parts)))
    kept = [
        each for each in duplicates if each.kind != "near-duplicate" or each.value >= raised.copies
    ]
    return kept, raised


def raise_limit(limits: Limits, duplicates: Sequence[Finding], images: int) -> Limits:
    """Limits at which at most 1 % of the real images, or ten, count as copies.

    Products on white, cells or digits resemble each other as a compressed copy does its original.
    The limit of copies rises to 0.97 at most, which crops and mirrored images reach.

    - `duplicates`: of the real images, from `find_duplicates`.
    - `images`: number of real images.
    """
    best: dict[tuple[str, str], float] = {}
    for each in duplicates:
        if each.kind == "near-duplicate":
            for key in ((each.split, each.id), (each.other_split, each.other)):
                best[key] = max(best.get(key, 0.0), each.value)
    allowed = max(images // 100, FEW)
    if len(best) <= allowed:
        return limits
    needed = sorted(best.values(), reverse=True)[allowed]
    return replace(limits, copies=max(limits.copies, min(needed, HIGHEST_LIMIT)))


def exact_duplicates(parts: Sequence[Images]) -> list[Finding]:
    """Every image whose pixels an earlier one has."""
    seen: dict[str, tuple[Images, int]] = {}
    findings = []
    for part in parts:
        for row, content in enumerate(part.contents):
            first = seen.setdefault(content, (part, row))
            if first[0] is not part or first[1] != row:
                findings.append(_about((part, row), "exact-duplicate", 1.0, first))
    return findings


def find_synthetic_copies(
    synthetic: Images,
    parts: Sequence[Images],
    limits: Limits,
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[Finding]:
    """Synthetic images that copy real ones: held-out ones, other ones than their source, or it.

    An image that copies a held-out image is leakage, and nothing else.

    - `parts`: the real images, `train` first.
    """
    pixels = [(part, row) for part in parts for row in range(len(part))]
    number_of = {part.contents[row]: number for number, (part, row) in _last_first(pixels)}
    contents = [number_of[part.contents[row]] for part, row in pixels]
    sources = np.asarray([number_of.get(each, -1) for each in synthetic.sources], np.int64)
    thumbnails = [part.thumbnails for part in parts]
    copies = find_copies(
        synthetic.thumbnails,
        Stack(thumbnails),
        same_query=sources,
        same_reference=np.asarray(contents, np.int64),
        threshold=limits.copies,
        on_progress=on_progress,
    )
    found: dict[int, Finding] = {}
    for query, reference, similarity in _pairs(copies):
        held_out = pixels[reference][0].split != "train"
        kind = "leakage" if held_out else "copies-another"
        finding = _about((synthetic, query), kind, similarity, pixels[reference])
        before = found.get(query)
        if before is None or _rank(finding) > _rank(before):
            found[query] = finding
    low = np.flatnonzero((synthetic.levels < limits.own_source) & (sources >= 0))
    rows = np.asarray([row for row in low.tolist() if row not in found], np.int64)
    similarities = compare(Stack([synthetic.thumbnails], rows), Stack(thumbnails, sources[rows]))
    for row, similarity in zip(rows.tolist(), similarities.tolist(), strict=True):
        if similarity >= limits.copies:
            source = pixels[sources[row]]
            found[row] = _about((synthetic, row), "copies-source", similarity, source)
    return [found[row] for row in sorted(found)]


def find_poor(images: Images, limits: Limits) -> list[Finding]:
    """Images that are too dark, too bright, blurred, of one colour, of an odd shape, or grey."""
    if not len(images):
        return []
    column = images.measures
    wide, high = images.sizes[:, 0].astype(float), images.sizes[:, 1].astype(float)
    area = wide * high
    factor = area / np.median(area)
    aspect = np.maximum(wide / high, high / wide)
    plain = column["information"] < limits.information
    grey = column["colour"] <= limits.colour
    coloured = grey.mean() < 0.5
    tests = {
        "dark": (column["dark"] < limits.dark, column["dark"]),
        "bright": (column["bright"] > limits.bright, column["bright"]),
        "blurred": (~plain & (column["sharpness"] < limits.sharpness), column["sharpness"]),
        "low-information": (plain, column["information"]),
        "odd-aspect": (aspect > limits.aspect, aspect),
        "odd-size": ((factor > limits.size) | (factor < 1 / limits.size), factor),
        "grey": (grey & coloured, column["colour"]),
    }
    return [
        _about((images, row), kind, float(values[row]))
        for kind, (bad, values) in tests.items()
        for row in np.flatnonzero(bad).tolist()
    ]


def find_drift(
    real: np.ndarray,
    real_labels: np.ndarray,
    synthetic: np.ndarray,
    labels: np.ndarray,
    *,
    levels: np.ndarray,
    limits: Limits,
) -> list[Finding]:
    """Classes and levels of which the synthetic images collapse or wander off.

    Precision and coverage are those of arXiv 2002.09797 with k = 5. Coverage is divided by that
    expected of as many real images. Classes with fewer than six images of either kind are left out.

    - `real` `[n, dimensions]`, `synthetic` `[m, dimensions]`: features; `real_labels` `[n]`,
      `labels` `[m]` and `levels` `[m]` belong to them.
    """
    from ..evaluation.worth import precision_and_coverage  # loads torch

    findings = []
    rows_of = _rows_by(real_labels)
    for label, rows in _rows_by(labels).items():
        own = rows_of.get(label, np.zeros(0, int))
        for level in np.unique(levels[rows]).tolist():
            chosen = rows[levels[rows] == level]
            if min(len(own), len(chosen)) <= NEIGHBOURS:
                continue
            precision, coverage = precision_and_coverage(real[own], synthetic[chosen], NEIGHBOURS)
            relative = coverage / expected_coverage(len(own), len(chosen))
            for kind, value, least in (
                ("collapsed", relative, limits.coverage),
                ("wandered", precision, limits.precision),
            ):
                if value < least:
                    findings.append(Finding(kind, SYNTHETIC, "", label, level, value))
    return findings


def expected_coverage(real: int, synthetic: int, neighbours: int = NEIGHBOURS) -> float:
    """Coverage of images that are as various as the real ones (arXiv 2002.09797, eq. 10).

    - `real`, `synthetic`: number of images.
    - `neighbours`: k, fewer than `real`.
    """
    missed = 1.0
    for each in range(1, neighbours + 1):
        missed *= (real - each) / (synthetic + real - each)
    return 1 - missed


def describe_findings(findings: Iterable[Finding]) -> list[str]:
    """A line per kind and split: how many, and an example."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        key = (finding.kind, finding.split, finding.other_split)
        groups.setdefault(key, []).append(finding)
    order = list(KINDS)
    lines = []
    for (kind, split, other), found in sorted(groups.items(), key=lambda e: order.index(e[0][0])):
        where = f"{split} against {other}" if other and other != split else split
        example = found[0]
        of = f" of '{example.other}'" if example.other else ""
        shown = f" (for example '{example.id}'{of})" if example.id else ""
        lines.append(f"{where}: {KINDS[kind]}: {len(found):,}{shown}")
    return lines


def as_columns(measures: Sequence[Measures]) -> dict[str, np.ndarray]:
    """Columns of the figures of many images, float32 `[images]` each."""
    return {
        field.name: np.asarray([getattr(each, field.name) for each in measures], np.float32)
        for field in fields(Measures)
    }


def _rank(finding: Finding) -> tuple[bool, float]:
    return finding.kind == "leakage", finding.value


def _about(
    image: tuple[Images, int], kind: str, value: float, other: tuple[Images, int] | None = None
) -> Finding:
    part, row = image
    finding = (kind, part.split, part.ids[row], int(part.labels[row]), int(part.levels[row]))
    if other is None:
        return Finding(*finding, value)
    return Finding(*finding, value, other[0].split, other[0].ids[other[1]])


def _pairs(copies: Copies) -> Iterable[tuple[int, int, float]]:
    columns = (copies.queries, copies.references, copies.similarity)
    return zip(*(column.tolist() for column in columns), strict=True)


def _last_first(pixels: Sequence[tuple[Images, int]]) -> Iterable[tuple[int, tuple[Images, int]]]:
    """Numbered from the last to the first, so that a mapping keeps the first of equal contents."""
    return reversed(list(enumerate(pixels)))


def _rows_by(labels: np.ndarray) -> dict[int, np.ndarray]:
    """`{label: rows}`, in one pass for any number of classes."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    return dict(zip(present.tolist(), np.split(order, starts[1:]), strict=True))
