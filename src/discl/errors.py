"""Every error that discl raises on purpose.

    DisclError
    ├── RecipeError       a key or value of the recipe is wrong
    ├── DataError         images, labels or splits are missing, unreadable or contradict each other
    ├── CheckpointError   a model folder lacks something, is of the wrong family, holds pickled weights, or needs more memory than there is
    ├── EndpointError     a server that writes prompts is down, refuses, or answers nonsense
    ├── StoreError        the spectrum or its scores cannot be read or written
    ├── RunError          a run folder belongs to another recipe, or a stage lacks its input
    └── TrainingError     training cannot go on (no finite loss, no sample to draw, foreign checkpoint)

Each message says what was got, what is allowed and how to mend it. Anything else that escapes is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DisclError(Exception):
    """Base of all errors that a user can mend."""


class RecipeError(DisclError, ValueError):
    """A key or value of the recipe is wrong. Also a ValueError, so that pydantic gathers all of them with their places."""


class DataError(DisclError):
    """Images, labels or splits are missing, unreadable or contradict each other."""


class CheckpointError(DisclError):
    """A model folder lacks something, is of the wrong family, or holds pickled weights."""


class EndpointError(DisclError):
    """A server that writes prompts is down, refuses, or answers nonsense."""


class StoreError(DisclError):
    """The spectrum or its scores cannot be read or written."""


class RunError(DisclError):
    """A run folder belongs to another recipe, or a stage lacks its input."""


class TrainingError(DisclError):
    """Training cannot go on."""


def unknown(kind: str, got: str, known: Iterable[str]) -> str:
    """Message for a name that is not among `known`, with the nearest one proposed."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{got}'; known: {', '.join(names)}.{hint}"
