"""The short form of an audit that `discl data check` makes while it decodes the images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from ..audit.coefficients import SIDE
from ..audit.copies import make_thumbnail
from ..audit.findings import Images, as_columns, describe_findings, find_poor, judge_duplicates
from ..audit.limits import Limits
from ..audit.measures import Measures, measure_image
from ..data import ImageTable, Inspection
from ..levels import REAL

MOST_COMPARED = 5_000
"""In larger data sets only `discl audit` searches for near duplicates."""


class QuickAudit:
    """Findings about images that are measured while they are decoded, in memory.

    - `compared`: whether to search for near duplicates.
    """

    def __init__(self, compared: bool) -> None:
        self.compared = compared
        self.known: dict[str, tuple[Measures, np.ndarray | None]] = {}

    def add(self, content: str, image: Image.Image) -> None:
        """Measures an image, named by the digest of its pixels. Threads may call it."""
        thumbnail = make_thumbnail(image) if self.compared else None
        self.known[content] = measure_image(image), thumbnail

    def describe(
        self, tables: Mapping[str, ImageTable], seen: Mapping[str, Inspection], limits: Limits
    ) -> list[str]:
        """A line per kind of finding and split, exact duplicates left out.

        - `tables`, `seen`: the images of each split; those that were not measured are left out.
        """
        parts = [self._gather(split, tables[split], seen[split]) for split in tables]
        findings = [each for part in parts for each in find_poor(part, limits)]
        if self.compared:
            duplicates, _ = judge_duplicates(parts, limits)
            findings += [each for each in duplicates if each.kind == "near-duplicate"]
        return describe_findings(findings)

    def _gather(self, split: str, table: ImageTable, seen: Inspection) -> Images:
        rows = [row for row, content in enumerate(seen.digests) if content in self.known]
        known = [self.known[seen.digests[row]] for row in rows]
        blank = np.zeros((SIDE, SIDE), np.uint8)
        thumbnails = [blank if each is None else each for _, each in known]
        return Images(
            split,
            [table.ids[row] for row in rows],
            [seen.digests[row] for row in rows],
            table.labels[rows],
            np.full(len(rows), REAL),
            [""] * len(rows),
            np.stack(thumbnails) if rows else np.zeros((0, SIDE, SIDE), np.uint8),
            np.asarray([seen.sizes[row] for row in rows], np.int64).reshape(-1, 2),
            as_columns([measures for measures, _ in known]),
        )
