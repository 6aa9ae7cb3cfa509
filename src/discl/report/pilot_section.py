"""What the report shows of `discl pilot` and of `discl adapt`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..checkpoints import weights_digest
from ..recipe.merge import set_value
from ..recipe.spectrum import TOKEN_RATE
from ..run_folder import paths
from ..spectrum.low_rank import read_adapter, record_of
from ..utils.stored import read_json
from . import text as words
from .charts import Axis, Chart, epoch_axis, line_chart, nice_axis

QUOTED_PATH = re.compile(r"'(~?/[^'\n]*|[A-Za-z]:[\\/][^'\n]*)'")
AGAIN = "Delete it and run `discl pilot` again."


@dataclass(frozen=True)
class GainCell:
    """A gain in points with its interval; the places are per cent of the common axis."""

    mean: float
    low: float
    high: float
    places: tuple[float, float, float]


@dataclass(frozen=True)
class PilotRow:
    """A candidate at a level, or at all; at the chosen threshold or another."""

    candidate: str
    level: int | None
    threshold: float
    kept: float
    images: int | None
    rows_per_kept: float | None
    recognised: float | None
    precision: float | None
    coverage: float | None
    few: GainCell | None
    overall: GainCell | None
    chosen: bool


@dataclass(frozen=True)
class Pilot:
    """What `discl pilot` found.

    - `candidate`: the recommended one; None if none is.
    - `similarity`: `{candidate: what discl levels measures}`.
    - `lines`: the recommended lines of a recipe; empty if it recommends none.
    """

    advised: bool
    candidate: str | None
    headline: str
    reasons: Sequence[str]
    lines: str
    judge: str
    mixture: str
    axis: Axis
    rows: Sequence[PilotRow]
    thresholds: Sequence[PilotRow]
    similarity: Mapping[str, Any]
    failed: Mapping[str, str]


def read_pilot(folder: Path) -> Pilot | None:
    """The pilot of a run folder; None if there is none."""
    file = folder / paths.PILOT / paths.PILOT_DATA
    if not file.is_file():
        return None
    keys = ("outcomes", "thresholds", "levels", "advice", "failed", "mixture")
    found = read_json(file, *keys, advice=AGAIN)
    advice = found["advice"]
    axis = _axis([*found["outcomes"], *found["thresholds"]])
    chosen = {each["candidate"]: each["threshold"] for each in found["outcomes"]}
    rows = [
        _row(
            each,
            axis,
            each["candidate"] == advice.get("candidate")
            and each["level"] in advice.get("levels", []),
        )
        for each in found["outcomes"]
    ]
    thresholds = [
        _row(each, axis, each["threshold"] == chosen[each["candidate"]])
        for each in found["thresholds"]
    ]
    return Pilot(
        advised=advice["generate"],
        candidate=advice.get("candidate"),
        headline=_headline(advice),
        reasons=advice["reasons"],
        lines=_lines(advice["recipe"]),
        judge=found.get("judge") or f"a linear head on features of {found.get('features')}",
        mixture=found["mixture"],
        axis=axis,
        rows=rows,
        thresholds=thresholds,
        similarity=found["levels"],
        failed={name: _without_folders(text) for name, text in found["failed"].items()},
    )


def _headline(advice: Mapping[str, Any]) -> str:
    if advice.get("undecided"):
        return "The pilot cannot tell yet whether images pay."
    if not advice["generate"]:
        return "The pilot advises against generating."
    levels = advice["levels"]
    named = f"{'level' if len(levels) == 1 else 'levels'} {', '.join(map(str, levels))}"
    return (
        f"The pilot recommends candidate “{advice['candidate']}”: {named}, threshold "
        f"{words.plain(advice['threshold'])}, strategy {advice['strategy']}."
    )


def _lines(changes: Mapping[str, Any]) -> str:
    tree: dict[str, Any] = {}
    for key, value in changes.items():
        tree = set_value(tree, key, value)
    shared = words.share_recipe(tree)
    if not shared:
        return ""
    return yaml.safe_dump(shared, sort_keys=False, default_flow_style=None, allow_unicode=True)


def _without_folders(text: str) -> str:
    """A message with quoted absolute paths reduced to their last name."""
    return QUOTED_PATH.sub(lambda found: f"'{words.shorten_path(found[1])}'", text)


def _axis(rows: Sequence[Mapping[str, Any]]) -> Axis:
    """A common axis of all gains, 0 included."""
    ends = [0.0]
    for row in rows:
        for name in ("few", "overall"):
            gain = (row["worth"] or {}).get(name)
            ends += [gain["low"], gain["high"]] if gain else []
    return nice_axis(min(ends), max(ends), 4)


def _row(found: Mapping[str, Any], axis: Axis, chosen: bool) -> PilotRow:
    worth = found["worth"] or {}

    def gain(name: str) -> GainCell | None:
        value = worth.get(name)
        if value is None:
            return None
        low, mean, high = (value[key] for key in ("low", "mean", "high"))
        return GainCell(mean, low, high, (axis.place(low), axis.place(mean), axis.place(high)))

    return PilotRow(
        candidate=found["candidate"],
        level=found.get("level"),
        threshold=found["threshold"],
        kept=found["kept"],
        images=found.get("images"),
        rows_per_kept=found.get("rows_per_kept"),
        recognised=worth.get("recognised"),
        precision=found.get("precision"),
        coverage=found.get("coverage"),
        few=gain("few"),
        overall=gain("overall"),
        chosen=chosen,
    )


@dataclass(frozen=True)
class Adaptation:
    """The adaptation of a run: settings and figures as `[(title, text)]`, and its loss."""

    facts: Sequence[tuple[str, str]]
    chart: Chart | None
    steps: Axis


def read_adaptation(folder: Path, recipe: Mapping[str, Any]) -> Adaptation | None:
    """The adaptation of a run folder; None if its recipe has none, or it was not carried out.

    Weights that an earlier version trained have no record of losses and seconds.
    """
    settings = recipe["spectrum"].get("adapt")
    pointer = folder / paths.ADAPTER
    if settings is None or not pointer.is_file():
        return None
    files = read_adapter(pointer, folder / paths.ADAPTED).present()
    record = record_of(files[0])
    found = read_json(record, "losses", "seconds") if record.is_file() else {}
    losses = [(float(step), float(loss)) for step, loss in found.get("losses", [])]
    steps = epoch_axis(settings["steps"])
    facts = [
        ("Weights", _weights(settings, found)),
        ("Training", _training(settings, found)),
        *(("File", _file(file)) for file in files),
    ]
    chart = line_chart("Loss", "", steps, {"loss": losses}, {"loss": "var(--accent)"})
    return Adaptation(facts, chart, steps)


def _file(file: Path) -> str:
    return f"{file.name}, digest {weights_digest(file)[:16]}" if file.is_file() else "absent"


def _weights(settings: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    parts = []
    if settings["rank"]:
        parts.append(f"rank {settings['rank']}, {settings['layers'].replace('-', ' ')}")
    if tokens := settings.get("class_tokens", 0):
        parts.append(words.plural(tokens, "token for each class", "tokens for each class"))
    text = " and ".join(parts)
    return f"{text}: {words.number(found['values'])} values" if "values" in found else text


def _training(settings: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    rates = [f"learning rate {settings['learning_rate']:g}"] if settings["rank"] else []
    if settings.get("class_tokens", 0):
        rates.append(f"{settings.get('token_learning_rate', TOKEN_RATE):g} for the tokens")
    steps = words.plural(settings["steps"], "step")
    parts = [f"{steps} of {settings['batch_size']} images, {', '.join(rates)}"]
    if settings["prior_weight"]:
        parts.append(f"prior weight {settings['prior_weight']:g}")
    if found:
        images = words.plural(found["images"], "real training image")
        parts.append(f"{images} of {words.plural(found['classes'], 'class', 'classes')}")
        parts.append(
            f"loss {found['losses'][0][1]:.3f} at first, {found['losses'][-1][1]:.3f} at the end"
        )
        parts.append(words.duration(found["seconds"]))
    return "; ".join(parts)
