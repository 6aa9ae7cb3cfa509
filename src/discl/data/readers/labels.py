"""Class names from labels.

Written by hand because readers of CSV turn "001" into 1, "true" into a Boolean and gaps into NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc

from ...errors import DataError

WHOLE = re.compile(r"[+-]?[0-9]+")
BLANKS = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND"),
        *("1.#QNAN", "N/A", "NA", "NULL", "NaN", "n/a", "nan", "null", "None", "none", "<NA>"),
    )
)
"""What programs write for a missing number."""
SHOWN = 5


def is_whole(text: str) -> bool:
    """Whether a text is a whole number in the digits 0 to 9."""
    return WHOLE.fullmatch(text) is not None


def name_numbers(written: Iterable[str], where: str) -> tuple[str, ...]:
    """Class names of whole numbers, sorted as numbers, each as it is written ("001" stays "001").

    Numbers from 0 without a gap are their own labels.

    Raises DataError for numbers below 0, which mean "no label", and for one number with two
    spellings.
    """
    texts = sorted(set(written), key=_number_key)
    below = [text for text in texts if text.startswith("-") and text.strip("-0")]
    if below:
        raise negative_labels(where, below)
    for one, other in pairwise(texts):
        if _number_key(one)[:2] == _number_key(other)[:2]:
            raise DataError(
                f"{where}: the label {_number_key(one)[1] or '0'} is written as '{one}' and as "
                f"'{other}'; write it in one way, or these would be two classes."
            )
    return tuple(texts)


def negative_labels(where: str, found: Sequence[object]) -> DataError:
    """The error for labels below 0."""
    shown = ", ".join(map(str, found[:SHOWN])) + ", …" * (len(found) > SHOWN)
    return DataError(
        f"{where}: labels below 0 ({shown}). They mean 'no label', or are a mistake; remove these "
        "images, or leave out a split without labels, for example {test: null}.",
        argument="splits",
    )


def _number_key(text: str) -> tuple[int, str, str]:
    """Sorts texts of digits as the numbers that they are, of any length."""
    digits = text.lstrip("+-").lstrip("0")
    return len(digits), digits, text


def labels_as_written(values: pa.ChunkedArray, where: str) -> tuple[pa.ChunkedArray, bool]:
    """(a column of labels of a CSV, read as texts; whether all of them are whole numbers).

    Whole numbers keep their digits, 1.0 becomes 1, and a missing number becomes null. Other texts
    stay as they are.

    Raises DataError for numbers with fractions, which are no classes.
    """
    trimmed = pc.utf8_trim_whitespace(values)
    given = [text for text in pc.unique(trimmed).to_pylist() if text not in BLANKS]
    if not given or not all(_is_number(text) for text in given):
        return values, False
    broken = [text for text in given if not is_whole(text) and not float(text).is_integer()]
    if broken:
        raise DataError(
            f"{where}: labels are numbers with fractions ({', '.join(broken[:SHOWN])}); whole "
            "numbers or texts are expected. Name the column of the classes, for example "
            "{label: their_name}.",
            argument="columns",
        )
    plain = {text: text if is_whole(text) else str(int(float(text))) for text in given}
    keys, names = pa.array(list(plain), pa.string()), pa.array(list(plain.values()), pa.string())
    return pc.take(names, pc.index_in(trimmed, value_set=keys)), True


def _is_number(text: str) -> bool:
    if is_whole(text):
        return True
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False
