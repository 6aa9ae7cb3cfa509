"""Thumbnails of several sets as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Stack:
    """Arrays one below the other, or some of their rows. Rows are copied when they are asked for.

    So arrays that are mapped from a file stay there.

    - `parts`: arrays `[rows, …]` of one type.
    - `chosen`: int64, which of all rows, in this order; None: all.
    """

    parts: Sequence[np.ndarray]
    chosen: np.ndarray | None = None

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.chosen is None else len(self.chosen)

    def __getitem__(self, which: int | slice) -> np.ndarray:
        """One row, or the rows of a slice, as an array in memory."""
        every = range(len(self))
        if isinstance(which, int):
            return self._rows(np.array([every[which]]))[0]
        return self._rows(np.asarray(every[which], np.int64))

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        if self.chosen is not None:
            rows = self.chosen[rows]
        part_of = np.searchsorted(self._ends, rows, side="right")
        found = np.empty((len(rows), *self.parts[0].shape[1:]), self.parts[0].dtype)
        for number in np.unique(part_of).tolist():
            mine = part_of == number
            part = self.parts[number]
            found[mine] = part[rows[mine] - (self._ends[number] - len(part))]
        return found
