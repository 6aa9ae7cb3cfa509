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
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gap"
DOMAINS = {"plain": "fashion", "half": "fashion", "vague": "fashion", "dim": "dim"}


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
    real = json.loads((RESULTS / f"real-{DOMAINS[setting]}-{draw}.json").read_text())["rows"]
    row = "text-only" if level == 0 else f"fixed-{level}"
    return made[row]["test"]["few"] - real["ce-undersampled"]["test"]["few"]


def rank(values: list[float]) -> list[float]:
    """Ranks from 0, the mean rank for equal values."""
    order = sorted(values)
    return [(order.index(v) + len(order) - 1 - order[::-1].index(v)) / 2 for v in values]


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation: Pearson's, of the ranks."""
    import numpy as np

    return float(np.corrcoef(rank(first), rank(second))[0, 1])


def table(estimates: dict[str, dict[str, Any]]) -> str:
    """Arms with estimate, final gain and verdicts; rank correlation; wrong verdicts."""
    import statistics

    arms = read_arms()
    lines = ["| setting | λ, % | recognised | pilot, few | pilot, all | final, few | verdict | |"]
    lines.append("|---|---:|---:|---:|---:|---:|---|---|")
    predicted, final, yes, no = [], [], 0, 0
    for setting in arms["settings"]:
        draws = [key for key in estimates if key.rsplit("-", 1)[0] == setting]
        if not draws:
            continue
        for level in arms["levels"]:
            found = [estimates[key][str(level)] for key in draws]
            gains = [final_gain(setting, level, int(key.rsplit("-", 1)[1])) for key in draws]
            mean = {
                name: statistics.mean(each[name] for each in found)
                for name in ("few", "overall", "recognised")
            }
            gain = statistics.mean(gains)
            advised = statistics.mean(each["low"] > 0 and each["overall"] > 0 for each in found)
            predicted.append(mean["few"])
            final.append(gain)
            wrong = ""
            if advised > 0.5 and gain <= 0:
                yes, wrong = yes + 1, "false do it"
            elif advised <= 0.5 and gain > 0:
                no, wrong = no + 1, "false don't"
            lines.append(
                f"| {setting} | {level} | {mean['recognised']:.2f} | {mean['few']:+.1f} "
                f"| {mean['overall']:+.1f} | {gain:+.1f} | {advised:.0%} do it | {wrong} |"
            )
    lines += [
        "",
        f"Spearman over {len(final)} arms: {spearman(predicted, final):.2f} (expected "
        f'{arms["expected"]["spearman"]}); false "do it" {yes}, false "don\'t" {no}.',
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
