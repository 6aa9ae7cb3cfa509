"""Rows that show what synthetic images add: the same mixture and the best row without them.

Retrieved images are real, so a row with them may be the best one. It has a control itself.

Methods are plain mappings, as in a recipe's section `methods`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..levels import REAL
from ..mixtures import LONG_FORM, name_mixture, read_mixture

ADJUSTED, NORMALISED, ENSEMBLED = VARIANTS = ("+la", "+tau", "+we")
"""Suffixes of rows that are computed from a classifier after training: post-hoc logit adjustment, a
τ-normalised head, weight ensembling."""
SAME_MIXTURE = "same-mixture"
MIXTURE_HEADING = "{} − same mixture without synthetic images"
BEST_HEADING = "{} − best row without synthetic images"
ABSENT = (
    "The recipe has no row with the same mixture where the difference is missing. These lines add "
    "it:"
)
SHARED: Mapping[str, Any] = {
    "objective": "cross-entropy",
    "system": None,
    "fine_tune": "full",
    "prior": "real",
    "train": {},
}
"""Keys in which a method and its control agree, besides the mixture, and their defaults."""
SCALE = 3.0
Method = Mapping[str, Any]


@dataclass(frozen=True)
class Controls:
    """The rows that methods with synthetic images are compared with.

    - `same_mixture`: `{row: its control}`, None where the recipe has none; rows with synthetic or
      retrieved images only.
    - `best`: the best row without synthetic images, None if there is none.
    - `notes`: sentences that name these rows.
    - `lines`: YAML of the controls that are absent, for the section `methods`.
    """

    same_mixture: Mapping[str, str | None]
    best: str | None
    notes: Sequence[str]
    lines: str


def split_variant(row: str) -> tuple[str, str]:
    """("discl", "+la") of "discl+la"."""
    method, plus, variant = row.partition("+")
    return (method, plus + variant) if plus + variant in VARIANTS else (row, "")


def takes_synthetic_images(method: Method) -> bool:
    """Whether a method trains on synthetic images; level 100 holds real ones."""
    strategy = method.get("strategy", "real-only")
    return strategy != "real-only" and not (strategy == "fixed" and method.get("level") == REAL)


def takes_retrieved_images(method: Method) -> bool:
    """Whether a method trains on images of an archive."""
    return method.get("images") == "retrieved"


def find_control(methods: Mapping[str, Method], name: str, by_tail: bool) -> str | None:
    """The method with the same mixture as `name`, but with training images only; None if absent.

    It agrees in mixture, objective, prior, system, fine-tuning and the changes of `train`. Its
    strategy is `real-only`, or `fixed` at level 100. Neither undersampled nor class-balanced, the
    tail has more samples with synthetic images than without. Only `fixed` at level 100 with the
    same `synthetic_scale` has the same mixture then.

    - `methods`: `{name: method}`.
    - `by_tail`: whether `hard.rule` is tail, where methods with a spectrum undersample by default.
    """
    wanted = _mixture(methods[name], by_tail)
    for other, method in methods.items():
        if _adds_images(method) or _mixture(method, by_tail) != wanted:
            continue
        repeats = method.get("strategy") == "fixed"
        if not _depends_on_scale(wanted) or (repeats and _scale(method) == _scale(methods[name])):
            return other
    return None


def absent_control(method: Method, by_tail: bool) -> dict[str, Any]:
    """The control of a method as a recipe states it, without defaults."""
    wanted = _mixture(method, by_tail)
    if _depends_on_scale(wanted):
        row: dict[str, Any] = {"strategy": "fixed", "level": REAL}
    else:
        row = {"strategy": "real-only"}
    name = name_mixture(wanted["undersample"], wanted["sampling"])
    long_form = {key: wanted[key] for key in LONG_FORM}
    row |= long_form if name is None else {"mixture": name}
    if _depends_on_scale(wanted) and _scale(method) != SCALE:
        row["synthetic_scale"] = _scale(method)
    stated = {key: method.get(key, default) for key, default in SHARED.items()}
    row |= {key: value for key, value in stated.items() if _spec(value) != _spec(SHARED[key])}
    finish = _finish_of_head(method)
    return row if finish is None else row | {"finish": finish}


def make_controls(
    recipe: Mapping[str, Any],
    rows: Sequence[str],
    scores: Mapping[str, float],
    *,
    metric: str,
    chosen_on: str,
    shown: str,
) -> Controls | None:
    """The controls of a table; None if none of its rows takes synthetic or retrieved images.

    - `recipe`: plain tree with `methods` and `hard.rule`.
    - `rows`: names of the table's rows, such as `discl` and `discl+la`.
    - `scores`: `{row: value}` that the best row without synthetic images is chosen by.
    - `metric`, `chosen_on`: what these values are, and on which split.
    - `shown`: the split of the table.
    """
    methods, by_tail = recipe["methods"], recipe["hard"]["rule"] == "tail"
    shown_methods = {split_variant(row)[0] for row in rows}
    adding = [name for name in methods if name in shown_methods and _adds_images(methods[name])]
    if not adding:
        return None
    control = {name: find_control(methods, name, by_tail) for name in adding}
    same: dict[str, str | None] = {}
    plain: dict[str, float] = {}
    for row in rows:
        method, variant = split_variant(row)
        if method in control:
            other = control[method]
            found = other is not None and other + variant in rows
            same[row] = f"{other}{variant}" if found else None
        if row in scores and not takes_synthetic_images(methods.get(method, {})):
            plain[row] = scores[row]
    best = max(plain, key=lambda row: plain[row], default=None)
    return Controls(
        same,
        best,
        [*_describe_mixtures(control), _describe_best(best, metric, chosen_on, shown)],
        _lines(methods, [name for name in adding if control[name] is None], by_tail),
    )


def _adds_images(method: Method) -> bool:
    return takes_synthetic_images(method) or takes_retrieved_images(method)


def _describe_mixtures(control: Mapping[str, str | None]) -> list[str]:
    by_control: dict[str, list[str]] = {}
    for name, other in control.items():
        if other is not None:
            by_control.setdefault(other, []).append(name)
    if not by_control:
        return []
    named = "; ".join(f"{other} for {' and '.join(names)}" for other, names in by_control.items())
    return [f"Same mixture without synthetic images: {named}."]


def _describe_best(best: str | None, metric: str, chosen_on: str, shown: str) -> str:
    if best is None:
        return "No row is without synthetic images."
    text = f"Best row without synthetic images: {best}, chosen by {metric} on {chosen_on}"
    return text + (
        f", the split that is shown, which favours {best}." if chosen_on == shown else "."
    )


def _lines(methods: Mapping[str, Method], without: Sequence[str], by_tail: bool) -> str:
    """YAML that adds the controls of these methods, each once."""
    added: dict[str, Any] = {}
    for name in without:
        row = absent_control(methods[name], by_tail)
        if row not in added.values():
            added[_free_name([*methods, *added])] = row
    return "".join(
        f"  {name}: "
        + yaml.safe_dump(
            row, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000
        )
        for name, row in added.items()
    )


def _free_name(taken: Sequence[str]) -> str:
    folded, name, number = {each.casefold() for each in taken}, SAME_MIXTURE, 1
    while name in folded:
        number += 1
        name = f"{SAME_MIXTURE}-{number}"
    return name


def _mixture(method: Method, by_tail: bool) -> dict[str, Any]:
    """What a method and its control agree in."""
    pair = dict(zip(LONG_FORM, read_mixture(method, by_tail), strict=True))
    shared = {key: _spec(method.get(key, default)) for key, default in SHARED.items()}
    return pair | shared | {"finish": _finish_of_head(method)}


def _finish_of_head(method: Method) -> Any:
    """`finish` where it trains the head; elsewhere it only leaves synthetic images out."""
    finish = method.get("finish") or {}
    return finish if finish.get("head_only") else None


def _depends_on_scale(mixture: Mapping[str, Any]) -> bool:
    """Whether synthetic images change the classes' fractions of an epoch."""
    return not mixture["undersample"] and mixture["sampling"] != "class-balanced"


def _scale(method: Method) -> float:
    return float(method.get("synthetic_scale", SCALE))


def _spec(value: Any) -> Any:
    """`cuda` and `{name: cuda}` are equal."""
    return {"name": value} if isinstance(value, str) else value
