"""Does `discl pilot` rank what pays? Its estimates against final gains, over arms named before.

    python -m benchmarks.pilot --work build/gap    # estimates for the draws there
    python -m benchmarks.pilot --table                     # from the committed figures

The arms are in `results/gap/pilot_arms.yaml`, the final gains in `results/gap`. Estimates are added
to `results/gap/pilot.json`, a draw and setting at a time; what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gap import SETTINGS, spearman

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gap"


def read_arms() -> dict[str, Any]:
    import yaml

    return yaml.safe_load((RESULTS / "pilot_arms.yaml").read_text())


def estimate(folder: Path, levels: list[int], images: int) -> dict[str, Any]:
    """`{level: {few, low, high, overall, recognised}}` of one run of `gap.py`."""
    import numpy as np
    from PIL import Image

    from discl import ClipScorer, SpectrumDataset, load_recipe
    from discl.evaluation.worth import Features, estimate_worth

    recipe = load_recipe(folder / "recipe.yaml")
    train = SpectrumDataset.of_run(folder)
    held_out = SpectrumDataset.of_run(folder, split="validation")
    scorer = ClipScorer(recipe.filter.checkpoint, {})

    def embed(dataset: Any, rows: Any) -> Any:
        pictures: list[Image.Image] = [dataset[int(row)].image.convert("RGB") for row in rows]
        return scorer.embed(pictures).astype(np.float32)

    pool = train.pool
    real = np.flatnonzero(~pool.synthetic)
    known = Features(embed(train, real), pool.labels[real])
    later = Features(embed(held_out, range(len(held_out))), held_out.pool.labels)
    found = {}
    for level in levels:
        rows = np.flatnonzero(pool.synthetic & (pool.levels == level))
        rows = rows[np.random.default_rng(level).permutation(len(rows))[:images]]
        worth = estimate_worth(
            known,
            pool.hard[real],
            Features(embed(train, rows), pool.labels[rows]),
            pool.sources[rows],
            held_out=later,
        )
        assert worth.overall is not None
        found[str(level)] = {
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


def measured_arms(estimates: dict[str, dict[str, Any]]) -> list[Arm]:
    """The arms of the file, in its order, that have an estimate."""
    named, found = read_arms(), []
    for setting in named["settings"]:
        draws = [key for key in estimates if key.rsplit("-", 1)[0] == setting]
        for level in named["levels"] if draws else ():
            of_draws = [estimates[key][str(level)] for key in draws]
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


def table(estimates: dict[str, dict[str, Any]]) -> str:
    """Arms with estimate, final gain and verdicts; rank correlation; wrong verdicts."""
    arms = measured_arms(estimates)
    lines = ["| setting | λ, % | recognised | pilot, few | pilot, all | final, few | verdict | |"]
    lines.append("|---|---:|---:|---:|---:|---:|---|---|")
    lines += [
        f"| {arm.setting} | {arm.level} | {arm.recognised:.2f} | {arm.few:+.1f} "
        f"| {arm.overall:+.1f} | {arm.gain:+.1f} | {arm.advised:.0%} do it | {arm.mistake} |"
        for arm in arms
    ]
    yes, no = (sum(arm.mistake == each for arm in arms) for each in ("false do it", "false don't"))
    correlation = spearman([arm.few for arm in arms], [arm.gain for arm in arms])
    lines += [
        "",
        f"Spearman over {len(arms)} arms: {correlation:.2f} (expected "
        f'{read_arms()["expected"]["spearman"]}); false "do it" {yes}, false "don\'t" {no}.',
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/gap"))
    parser.add_argument("--table", action="store_true", help="print the table and do nothing else")
    arguments = parser.parse_args()
    arms, file = read_arms(), RESULTS / "pilot.json"
    estimates = json.loads(file.read_text()) if file.exists() else {}
    if not arguments.table:
        for setting in arms["settings"]:
            for draw in range(1, 10):
                key, folder = f"{setting}-{draw}", arguments.work / "runs" / f"{setting}-{draw}"
                if key in estimates or not (RESULTS / f"{key}.json").exists():
                    continue
                if not (folder / "filter.parquet").exists():
                    print(f"{key}: no run in {arguments.work}", file=sys.stderr)
                    continue
                estimates[key] = estimate(folder, arms["levels"], arms["images"])
                file.write_text(json.dumps(dict(sorted(estimates.items())), indent=1) + "\n")
                print(key, flush=True)
    print(table(estimates))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
