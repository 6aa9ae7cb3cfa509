"""Does `discl pilot` rank what pays? Its estimates against final gains, over arms named before.

    python -m benchmarks.pilot --work build/gap            # estimates for the draws there
    python -m benchmarks.pilot --table                     # from the committed figures

The arms are in `results/gap/pilot_arms.yaml`, the final gains in `results/gap`. Estimates are added
to `results/gap/pilot.json`, a draw and setting at a time; what is there is not computed again. Each
has one kind for each `pilot.judge`: `network` and `head`. The kind `first` is of a head for which a
few synthetic images weighed as much as a whole spectrum. The kind `features` is of a head on
features of a network trained on the real images. Their code is no longer there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gap import SETTINGS, load_samples
from benchmarks.gap_tables import markdown, number, spearman

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gap"
FOLDS = 3
KINDS = {
    "network": "a small network, trained from scratch",
    "head": "a head on features of the filter's CLIP",
    "features": "a head on features of a network trained on the real images",
    "first": "the first head, for which images weighed more",
}
Estimates = dict[str, dict[str, Any]]
"""`{setting-draw: {kind: {level: {few, low, high, overall, recognised}}}}`."""


def read_arms() -> dict[str, Any]:
    import yaml

    return yaml.safe_load((RESULTS / "pilot_arms.yaml").read_text())


def estimate(name: str, draw: int, work: Path, arms: dict[str, Any]) -> dict[str, Any]:
    """`{judge: {level: {few, low, high, overall, recognised}}}` of one run of `gap.py`."""
    import numpy as np
    from PIL import Image

    from discl import ClipScorer, load_recipe
    from discl.evaluation.proxy import Proxies
    from discl.evaluation.worth import Features, deal_folds, estimate_worth, fit_linear

    samples = load_samples(name, draw, work, None)
    pool, (later, later_labels) = samples.pool, samples.held_out["validation"]
    real = np.flatnonzero(~pool.synthetic)
    recipe = load_recipe(work / "runs" / f"{name}-{draw}" / "recipe.yaml")
    scorer = ClipScorer(recipe.filter.checkpoint, {})

    def embed(pixels: Any) -> Any:
        pictures = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]
        return scorer.embed(pictures).astype(np.float32)

    found: dict[str, Any] = {}
    for kind, describe, fit in (
        ("head", embed, fit_linear),
        ("network", lambda pixels: pixels.numpy(), Proxies().fit),
    ):
        known = Features(describe(samples.pixels[real]), pool.labels[real])
        others = Features(describe(later), later_labels.numpy())
        for level in arms["levels"]:
            rows = np.flatnonzero(pool.synthetic & (pool.levels == level))
            rows = rows[np.random.default_rng(level).permutation(len(rows))[: arms["images"]]]
            worth = estimate_worth(
                known,
                pool.hard[real],
                Features(describe(samples.pixels[rows]), pool.labels[rows]),
                pool.sources[rows],
                fold_of=deal_folds(pool.labels[real], pool.hard[real], FOLDS),
                fit=fit,
                held_out=others,
                mixture="undersampled",  # as the final networks are trained
            )
            assert worth.overall is not None
            found.setdefault(kind, {})[str(level)] = {
                "few": round(worth.few.mean, 2),
                "low": round(worth.few.low, 2),
                "high": round(worth.few.high, 2),
                "overall": round(worth.overall.mean, 2),
                "recognised": round(worth.recognised, 3),
            }
    return found


def final_gain(setting: str, level: int, draw: int) -> float:
    """Few of an arm less few of the same mixture without synthetic images, in points."""
    made = json.loads((RESULTS / f"{setting}-{draw}.json").read_text())["rows"]
    real = json.loads((RESULTS / f"real-{SETTINGS[setting].domain}-{draw}.json").read_text())[
        "rows"
    ]
    row = "text-only" if level == 0 else f"fixed-{level}"
    return made[row]["test"]["few"] - real["ce-undersampled"]["test"]["few"]


@dataclass(frozen=True)
class Arm:
    """One setting and level: the pilot's means over the draws, and the mean gain after training.

    `advised` is the fraction of draws in which the pilot's rule says "do it".
    """

    setting: str
    level: int
    few: float
    overall: float
    recognised: float
    advised: float
    gain: float

    @property
    def mistake(self) -> str:
        """What the verdict of most draws got wrong, or nothing."""
        if self.advised > 0.5 and self.gain <= 0:
            return "false do it"
        return "false don't" if self.advised <= 0.5 and self.gain > 0 else ""


def measured_arms(estimates: Estimates, kind: str, settings: Sequence[str]) -> list[Arm]:
    """The arms of these settings, in the order of the file, that have an estimate of a kind."""
    named, found = read_arms(), []
    for setting in settings:
        draws = [
            key for key in estimates if key.rsplit("-", 1)[0] == setting and kind in estimates[key]
        ]
        for level in named["levels"] if draws else ():
            of_draws = [estimates[key][kind][str(level)] for key in draws]
            few, overall, recognised = (
                statistics.mean(each[name] for each in of_draws)
                for name in ("few", "overall", "recognised")
            )
            advised = statistics.mean(each["low"] > 0 and each["overall"] > 0 for each in of_draws)
            gain = statistics.mean(
                final_gain(setting, level, int(key.rsplit("-", 1)[1])) for key in draws
            )
            found.append(Arm(setting, level, few, overall, recognised, advised, gain))
    return found


def parts_of(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    """All arms, and those of each task."""
    first = read_arms()["settings"]
    return {
        "all": list(arms),
        "Fashion-MNIST-LT": [arm for arm in arms if arm.setting in first],
        "CIFAR-10-LT": [arm for arm in arms if arm.setting not in first],
    }


def summary(estimates: Estimates) -> str:
    """Rank correlations and wrong verdicts of both judges, as `docs/results.md` has them."""
    settings, body, counts = read_arms()["second"]["settings"], [], [0, 0, 0]
    for kind, title in {"head": "`head` (default)", "network": "`network`"}.items():
        if parts := parts_of(measured_arms(estimates, kind, settings)):
            ranks = [
                number(spearman([arm.few for arm in part], [arm.gain for arm in part]), digits=3)
                for part in parts.values()
            ]
            mistakes = [arm.mistake for arm in parts["all"]]
            wrong = [f"{mistakes.count(each)}" for each in ("false do it", "false don't")]
            body.append([title, *ranks, *wrong])
            counts = [len(part) for part in parts.values()]
    titles = [
        "`pilot.judge`",
        f"rank correlation, all {counts[0]}",
        f"{counts[1]} of Fashion-MNIST-LT",
        f"{counts[2]} of CIFAR-10-LT",
        "advised, did not pay",
        "not advised, paid",
    ]
    return markdown(titles, body)


def table(estimates: Estimates) -> str:
    """Arms with estimate, final gain and verdicts; rank correlations; wrong verdicts."""
    named = read_arms()
    lines = [summary(estimates), ""]
    for kind, title in KINDS.items():
        arms = measured_arms(estimates, kind, named["second"]["settings"])
        if not arms:
            continue
        lines += [f"**{title}**", ""]
        lines.append("| setting | λ, % | recognised | pilot, few | pilot, all | final, few | | |")
        lines.append("|---|---:|---:|---:|---:|---:|---|---|")
        lines += [
            f"| {arm.setting} | {arm.level} | {arm.recognised:.2f} | {arm.few:+.1f} "
            f"| {arm.overall:+.1f} | {arm.gain:+.1f} | {arm.advised:.0%} do it | {arm.mistake} |"
            for arm in arms
        ]
        lines.append("")
        lines += [f"- {describe(name, part)}" for name, part in parts_of(arms).items() if part]
        lines.append("")
    return "\n".join(lines).rstrip()


def describe(name: str, arms: Sequence[Arm]) -> str:
    """Rank correlation and wrong verdicts of some arms."""
    yes, no = (sum(arm.mistake == each for arm in arms) for each in ("false do it", "false don't"))
    correlation = spearman([arm.few for arm in arms], [arm.gain for arm in arms])
    paid, advised = sum(arm.gain > 0 for arm in arms), sum(arm.advised > 0.5 for arm in arms)
    return (
        f"{name}, {len(arms)} arms: Spearman {correlation:.3f}; {paid} pay, {advised} advised; "
        f'false "do it" {yes}, false "don\'t" {no}'
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/gap"))
    parser.add_argument("--table", action="store_true", help="print the table and do nothing else")
    arguments = parser.parse_args()
    arms, file = read_arms(), RESULTS / "pilot.json"
    estimates: Estimates = json.loads(file.read_text()) if file.exists() else {}
    if not arguments.table:
        for draw in range(10):  # so that a part of them is of all settings
            for setting in arms["second"]["settings"]:
                if not draw and setting in arms["settings"]:
                    continue
                key, folder = f"{setting}-{draw}", arguments.work / "runs" / f"{setting}-{draw}"
                known = estimates.get(key, {})
                if "network" in known or not (RESULTS / f"{key}.json").exists():
                    continue
                if not (folder / "filter.parquet").exists():
                    print(f"{key}: no run in {arguments.work}", file=sys.stderr)
                    continue
                estimates[key] = known | estimate(setting, draw, arguments.work, arms)
                file.write_text(json.dumps(dict(sorted(estimates.items())), indent=1) + "\n")
                print(key, flush=True)
    print(table(estimates))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
