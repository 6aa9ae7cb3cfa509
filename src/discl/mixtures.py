"""Mixtures by name: how often an epoch draws each class, with synthetic images and without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Mixture = Literal["undersampled", "class-balanced", "square-root", "all"]
"""A choice with a name.

- `undersampled`: the tail keeps its fraction of the classes (arXiv 2410.13674).
- `class-balanced`: every class equally often, from all real images.
- `square-root`: in proportion to the square root of a class's images, from all real images.
- `all`: all real images, as often as they are.
"""
Sampling = Literal["instance", "square-root", "class-balanced"]
MIXTURES: Mapping[Mixture, tuple[bool, Sampling]] = {
    "undersampled": (True, "instance"),
    "class-balanced": (False, "class-balanced"),
    "square-root": (False, "square-root"),
    "all": (False, "instance"),
}
"""`undersample` and `sampling` of each mixture."""
LONG_FORM = ("undersample", "sampling")
"""Keys of a method that `mixture` stands for."""


def read_mixture(method: Mapping[str, Any], by_tail: bool) -> tuple[bool, Sampling]:
    """Whether a method undersamples the head, and its `sampling`.

    - `method`: a method of a recipe as a plain mapping; a missing key has its default.
    - `by_tail`: whether `hard.rule` is tail, where methods with a spectrum undersample by default.
    """
    if method.get("mixture") is not None:
        return MIXTURES[method["mixture"]]
    undersample = method.get("undersample")
    if undersample is None:
        undersample = method.get("strategy", "real-only") != "real-only" and by_tail
    return undersample, method.get("sampling", "instance")


def name_mixture(undersample: bool, sampling: str) -> Mixture | None:
    """The name of a pair; None for an undersampled head that is resampled too."""
    return next((name for name, pair in MIXTURES.items() if pair == (undersample, sampling)), None)


def describe_mixture(method: Mapping[str, Any], by_tail: bool) -> str:
    """The name of a method's mixture, or its long form where it has none; see `read_mixture`."""
    undersample, sampling = read_mixture(method, by_tail)
    return name_mixture(undersample, sampling) or f"undersampled, {sampling}"


def in_long_form(method: Mapping[str, Any], by_tail: bool) -> dict[str, Any]:
    """The method with the pair in the place of `mixture`.

    `undersample` is None where that is the default of the method, so that both ways of writing a
    method have one digest.
    """
    if method.get("mixture") is None:
        return dict(method)
    undersample, sampling = read_mixture(method, by_tail)
    plain = {key: value for key, value in method.items() if key != "mixture"}
    default = read_mixture({"strategy": method.get("strategy", "real-only")}, by_tail)[0]
    return plain | {
        "undersample": None if undersample == default else undersample,
        "sampling": sampling,
    }
