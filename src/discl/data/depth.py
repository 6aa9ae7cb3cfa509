"""One rule per data set for grey images of more than 8 bits.

Cameras and microscopes store 10, 12 or 14 bits in 16, and programs store fractions. A file does
not say so, and one dark image is no evidence. The rule therefore follows from all images of a data
set, or `bits` states it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import DataError

Range = tuple[float, float]

BITS = (8, 10, 12, 14, 16)
TOPS = tuple(float(2**bits - 1) for bits in BITS)
SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Wide:
    """Values of a grey image of more than 8 bits: whole numbers or fractions, and their range."""

    fractions: bool
    low: float
    high: float


@dataclass(frozen=True)
class Depth:
    """The values that become 0 and 255, for images of whole numbers and of fractions."""

    whole: Range = (0.0, 65535.0)
    fractions: Range = (0.0, 1.0)

    def plain(self) -> dict[str, list[float]]:
        """The rule as JSON, which `depth_of` reads."""
        return {"whole": list(self.whole), "fractions": list(self.fractions)}

    def scale(self, values: np.ndarray, fractions: bool) -> np.ndarray:
        """Grey values as uint8; values beyond the range become black or white."""
        low, high = self.fractions if fractions else self.whole
        values = np.clip(np.nan_to_num(values.astype(np.float64), nan=0.0), low, high)
        scaled = (values - low) * (255 / max(high - low, 1e-300))
        return scaled.clip(0, 255).round().astype(np.uint8)


def depth_of(plain: Any) -> Depth:
    """The rule in the result of `Depth.plain`, or in its JSON. Raises DataError for others."""
    shown = repr(str(plain)[:SHOWN_CHARACTERS])
    try:
        stated = json.loads(plain) if isinstance(plain, str) else plain
        (low, high), (first, last) = stated["whole"], stated["fractions"]
        values = [float(value) for value in (low, high, first, last)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"the depth of grey images is not readable: {shown}; "
            "{whole: [black, white], fractions: [black, white]} is expected. Create the file that "
            "states it again."
        ) from error
    if not np.isfinite(values).all():
        raise DataError(f"the depth of grey images is not finite: {shown}.")
    return Depth((values[0], values[1]), (values[2], values[3]))


def measure(values: np.ndarray, fractions: bool) -> Wide:
    """The range of the finite values of an image."""
    finite = values[np.isfinite(values)] if fractions else values
    if not finite.size:
        return Wide(fractions, 0.0, 0.0)
    return Wide(fractions, float(finite.min()), float(finite.max()))


def common_depth(ranges: Iterable[Wide], bits: int | None = None) -> Depth:
    """The rule for images of these ranges.

    Whole numbers use the fewest of 8, 10, 12, 14 or 16 bits that hold the largest value. Fractions
    up to 1 have white at 1; larger ones follow the rule of whole numbers. If values are below 0 or
    beyond 16 bits, the range of the set is used.

    - `bits`: bits of whole numbers, if known.
    """
    ranges = list(ranges)
    whole = _joint_range([wide for wide in ranges if not wide.fractions], TOPS)
    if bits is not None:
        whole = (0.0, float(2**bits - 1))
    fractions = _joint_range([wide for wide in ranges if wide.fractions], (1.0, *TOPS))
    usual = Depth()
    return Depth(whole or usual.whole, fractions or usual.fractions)


@dataclass
class Ranges:
    """Number and joint range of grey images of more than 8 bits, by kind."""

    counts: dict[bool, int] = field(default_factory=dict)
    joint: dict[bool, Wide] = field(default_factory=dict)

    def add(self, wide: Wide) -> None:
        """Counts one more image."""
        kind, known = wide.fractions, self.joint.get(wide.fractions, wide)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.joint[kind] = Wide(kind, min(known.low, wide.low), max(known.high, wide.high))

    def describe(self, depth: Depth) -> str:
        """The rule in words, with the number and range of the images."""
        parts = []
        for kind, wide in sorted(self.joint.items()):
            black, white = depth.fractions if kind else depth.whole
            beyond = "; values beyond are cut off" if wide.low < black or wide.high > white else ""
            parts.append(
                f"{self.counts[kind]:,} of {'fractions' if kind else 'whole numbers'} from "
                f"{wide.low:g} to {wide.high:g}, where {black:g} is black and {white:g} "
                f"white{beyond}"
            )
        return f"grey images of more than 8 bits: {' and '.join(parts)}"


def _joint_range(ranges: list[Wide], tops: tuple[float, ...]) -> Range | None:
    if not ranges:
        return None
    low, high = min(wide.low for wide in ranges), max(wide.high for wide in ranges)
    top = next((top for top in tops if high <= top), None)
    return (low, high) if low < 0 or top is None else (0.0, top)
