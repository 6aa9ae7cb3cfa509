"""Early rejection against a judge that is never wrong: UNet rows for each kept image.

    python -m benchmarks.rejection --work build/rejection   # makes what is missing, then the table
    python -m benchmarks.rejection --table                  # from the committed figures

The generator is the embedded one of Fashion-MNIST, with 20 steps, at levels 0 and 50. Its prompts
are right with probability .6 (`half`) or .2 (`vague`), so that the filter drops a part. Every image
is finished, and looked at on the way at each of `LOOKS`. So any rule can be replayed on the same
images: some of them teach and are finished, the others are judged.

A perfect judge drops, after a fifth of the chain, exactly what the filter would drop. A rule's
savings are compared with its own, both in UNet rows for each kept image, teachers left out.
Intervals are bootstraps over the sources (95 %); each replicate also draws its teachers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULT = HERE / "results" / "rejection.json"
SETTINGS, LEVELS, STEPS, SEEDS = ("half", "vague"), (0, 50), 20, 16
LOOKS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
LOSS, AUDIT, TEACH = 0.05, 0.05, 200
PERFECT = 0.2
REPLICATES = 500


def make_setting(setting: str, work: Path, seeds: int) -> dict[str, Any]:
    """Makes all images of a setting; `{level: {"sources", "final", "looks"}}`."""
    from benchmarks.gap import SETTINGS as GAPS
    from benchmarks.gap import write_phrases

    from discl import load_recipe, open_run, run_until
    from discl.run_folder import paths
    from discl.stages.rejection import look_store
    from discl.utils.stored import read_table

    changes = {
        "levels": list(LEVELS),
        "seeds": seeds,
        "num_inference_steps": STEPS,
        "early_rejection": {"at": list(LOOKS), "teach": 1_000_000},
    }
    overrides = {f"spectrum.{key}": value for key, value in changes.items()}
    overrides["prompts.phrases"] = write_phrases(GAPS[setting], work)
    run = open_run(load_recipe("fashion-lt", overrides), work / "runs" / setting, amend=True)
    run_until(run, "filter")
    seen: dict[str, dict[int, float]] = {}
    for row in look_store(run).read().to_pylist():
        seen.setdefault(row["id"], {})[row["look"]] = row["similarity"]
    found: dict[str, Any] = {}
    numbers: dict[str, int] = {}
    for row in read_table(run.path(paths.FILTER)).to_pylist():
        level = found.setdefault(str(row["level"]), {"sources": [], "final": [], "looks": {}})
        level["sources"].append(numbers.setdefault(row["source_id"], len(numbers)))
        level["final"].append(round(row["clip_similarity"], 4))
        for look, similarity in seen[row["id"]].items():
            level["looks"].setdefault(str(look), []).append(round(similarity, 4))
    return {"threshold": run.recipe.filter.threshold, "levels": found}


# ---------------------------------------------------------------------------------- replaying


class Images:
    """All images of a setting and level.

    - `final`: `clip_similarity` of the finished images, `[images]`; `kept` if the filter keeps it.
    - `sources`: number of the source of each, `[images]`.
    - `looks`: `{steps taken: clip_similarity of x̂0 [images]}`.
    - `rows`: UNet rows of each step of their chain.
    """

    def __init__(self, values: Mapping[str, Any], threshold: float, level: int) -> None:
        from discl.spectrum.plan import step_rows

        self.final = np.asarray(values["final"])
        self.kept = self.final >= threshold
        self.sources = np.unique(values["sources"], return_inverse=True)[1]
        self.looks = {int(look): np.asarray(seen) for look, seen in values["looks"].items()}
        self.rows = step_rows(level, STEPS, 3.0)

    def until(self, look: int) -> int:
        """UNet rows of the steps before a look."""
        return sum(self.rows[:look])

    def steps(self, fractions: Sequence[float]) -> list[int]:
        from discl.spectrum.early_rejection import look_steps

        return list(look_steps(fractions, len(self.rows)))


Judge = Callable[[Images, np.ndarray, np.ndarray], np.ndarray]
"""(images, teachers, judged) -> the look at which each judged image falls, 0 for none."""


def separate_bounds(fractions: Sequence[float]) -> Judge:
    """The rule of the package: a bound at each look, the loss divided among the looks."""
    from discl.spectrum.early_rejection import conformal_bound

    def judge(images: Images, teachers: np.ndarray, judged: np.ndarray) -> np.ndarray:
        looks = images.steps(fractions)
        good, fell = teachers[images.kept[teachers]], np.zeros(len(judged), int)
        for look in reversed(looks):
            seen = images.looks[look]
            fell[seen[judged] < conformal_bound(seen[good], LOSS / len(looks))] = look
        return fell

    return judge


def joint_bounds(fractions: Sequence[float], fitted: bool = False) -> Judge:
    """One bound for all looks, on the lowest rank of an image among the dropped teachers.

    - `fitted`: rank the final similarity, predicted from the looks so far by least squares on half
      of the teachers, instead of the look's own.
    """
    from discl.spectrum.early_rejection import conformal_bound

    def judge(images: Images, teachers: np.ndarray, judged: np.ndarray) -> np.ndarray:
        looks = images.steps(fractions)
        learn, check = (teachers[::2], teachers[1::2]) if fitted else (teachers, teachers)
        known = [images.looks[look] for look in looks]
        if fitted:
            known = [_fitted(images, looks[: at + 1], learn) for at in range(len(looks))]
        bad, good = learn[~images.kept[learn]], check[images.kept[check]]
        ranks = [np.searchsorted(np.sort(seen[bad]), seen) / max(len(bad), 1) for seen in known]
        bound = conformal_bound(np.min([rank[good] for rank in ranks], axis=0), LOSS)
        fell = np.zeros(len(judged), int)
        for look, rank in reversed(list(zip(looks, ranks, strict=True))):
            fell[rank[judged] < bound] = look
        return fell

    return judge


def _fitted(images: Images, looks: Sequence[int], learn: np.ndarray) -> np.ndarray:
    columns = np.stack([np.ones(len(images.kept)), *(images.looks[look] for look in looks)], 1)
    weights = np.linalg.lstsq(columns[learn], images.final[learn], rcond=None)[0]
    return columns @ weights


def perfect(images: Images, teachers: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Drops after a fifth of the chain exactly what the filter would drop."""
    return np.where(images.kept[judged], 0, round(PERFECT * len(images.rows)))


def rows_per_kept(images: Images, judged: np.ndarray, fell: np.ndarray, audit: float) -> float:
    """UNet rows for each image that is kept.

    - `fell`: the look at which each of the `judged` images falls, 0 for none.
    - `audit`: fraction of the fallen images that is finished all the same, and kept if good.
    """
    whole = sum(images.rows)
    spent = np.array([whole if look == 0 else images.until(look) for look in fell.tolist()])
    spent = spent + audit * (whole - spent) * (fell > 0)
    kept = images.kept[judged] * np.where(fell > 0, audit, 1.0)
    return float(spent.sum() / max(kept.sum(), 1e-9))


RULES: dict[str, Judge] = {
    "default: a bound at .1 and one at .3": separate_bounds((0.1, 0.3)),
    "one bound at .2": separate_bounds((0.2,)),
    "one bound at .3": separate_bounds((0.3,)),
    "bounds at .2, .35, .5": separate_bounds((0.2, 0.35, 0.5)),
    "joint bound at .1, .3": joint_bounds((0.1, 0.3)),
    "joint bound at .2, .35, .5": joint_bounds((0.2, 0.35, 0.5)),
    "joint bound at .1, .2, .3, .4, .5": joint_bounds((0.1, 0.2, 0.3, 0.4, 0.5)),
    "joint bound on the predicted similarity": joint_bounds((0.1, 0.2, 0.3, 0.4, 0.5), fitted=True),
}


def replay(images: Images, rules: Mapping[str, Judge], replicates: int) -> dict[str, Any]:
    """Of each rule: rows for each kept image over today's, loss, and savings over the perfect's.

    Each figure is (mean, low, high) of a bootstrap over the sources. `over default` is the paired
    difference of the savings from those of the first rule.
    """
    rng = np.random.default_rng(18)
    everything, names = np.arange(len(images.kept)), np.unique(images.sources)
    drawn: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rules}
    ideal = []
    for _ in range(replicates):
        teachers, others = np.split(rng.permutation(everything), [TEACH])
        by_source = [others[images.sources[others] == name] for name in names]
        judged = np.concatenate([by_source[at] for at in rng.integers(len(names), size=len(names))])
        today = rows_per_kept(images, judged, np.zeros(len(judged), int), 0)
        best = rows_per_kept(images, judged, perfect(images, teachers, judged), 0)
        ideal.append(best / today)
        for name, rule in rules.items():
            fell = rule(images, teachers, judged)
            ratio = rows_per_kept(images, judged, fell, AUDIT) / today
            lost = (fell > 0)[images.kept[judged]].mean()
            drawn[name].append((ratio, lost, (1 - ratio) / (1 - best / today)))
    found: dict[str, Any] = {"perfect judge at .2": {"rows": _interval(ideal)}}
    default = np.array(next(iter(drawn.values())))
    for name, values in drawn.items():
        columns = zip(("rows", "loss", "of perfect"), np.array(values).T, strict=True)
        found[name] = {key: _interval(column) for key, column in columns}
        if name != next(iter(drawn)):
            found[name]["over default"] = _interval((np.array(values) - default)[:, 2])
    return found


def _interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(np.mean(values)), float(low), float(high)


# --------------------------------------------------------------------------------------- tables


def table(found: Mapping[str, Any]) -> str:
    """The rules in Markdown, a table for each setting and level."""
    lines = []
    for setting, values in found.items():
        for level, stored in values["levels"].items():
            images = Images(stored, values["threshold"], int(level))
            lines += [f"{setting}, level {level}: the filter keeps {images.kept.mean():.0%}", ""]
            lines += [
                "| rule | rows per kept image | lost | of the perfect's savings | − default |"
            ]
            lines += ["|---|---:|---:|---:|---:|"]
            for name, row in replay(images, RULES, REPLICATES).items():
                cells = [
                    "{:.2f} ({:.2f} to {:.2f})".format(*row[key]) if key in row else "–"
                    for key in ("rows", "loss", "of perfect", "over default")
                ]
                lines.append(f"| {name} | {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/rejection"))
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--table", action="store_true", help="print the committed figures")
    asked = parser.parse_args()
    found = json.loads(asked.json.read_text()) if asked.json.exists() else {}
    for setting in () if asked.table else SETTINGS:
        if setting not in found:
            found[setting] = make_setting(setting, asked.work, asked.seeds)
            unfinished = asked.json.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(found, separators=(",", ":")) + "\n")
            unfinished.replace(asked.json)
    print(table(found))


if __name__ == "__main__":
    main()
