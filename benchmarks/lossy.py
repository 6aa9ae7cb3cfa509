"""What lossy choices save and cost, always beside "just fewer steps".

    python -m benchmarks.lossy --work build/lossy --json benchmarks/results/lossy.json
    python -m benchmarks.lcm --out build/lossy/lcm.safetensors      # for the rows of LCM
    python -m benchmarks.lossy --rows "DDIM, 10 steps"              # this row; others stay
    python -m benchmarks.lossy --table                              # from the committed figures

Each row makes the same plan with one choice: fewer DDIM steps, another sampler, guidance on a part
of the steps, early rejection, or few steps of a distilled stand-in for an LCM-LoRA. The generator
is the embedded one of Fashion-MNIST, at level 0. Its prompts are right with probability .6, so that
the filter drops a part. A row whose file exists is not run again; call it again after a kill.

- UNet rows and seconds of the processor, for an image of the plan and for a kept one.
- Mean `clip_similarity`, and the fraction that the filter keeps.
- Precision, the fraction of the kept images in a ball around a real image (arXiv 1904.06991), and
  coverage, the fraction of the real images with a kept image in theirs (arXiv 2002.09797). The
  features are those of a classifier that was trained on real images (`gap.train_referee`), so
  neither the generator nor the filter knows them. All rows are compared with as many images, and
  rows of another referee are refused: it depends on the machine, and precision on it by some .03.
- Test accuracy on few classes of a ResNet-10 of width 8 that trains 24 epochs on real images and
  the kept ones, three seeds. The control has the same mixture without synthetic images.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "lossy.json"
STEPS, SEEDS, LEVELS = 20, 16, [0]
TRAIN_SEEDS = (0, 1, 2)
TRAIN = {"train.model.width": 8, "train.epochs": 24, "train.curriculum_epochs": 20}
CONTROL, LEARNER = "control", "text-only"
METHODS = {
    CONTROL: {"strategy": "real-only", "mixture": "undersampled"},
    LEARNER: {"strategy": "text-only", "missing": "nearest"},
}
COMPARED = 200
"""Kept images that are compared with real ones, or fewer where a row keeps fewer."""
ROWS: dict[str, dict[str, Any]] = {
    "DDIM, 20 steps": {},
    "DDIM, 10 steps": {"num_inference_steps": 10},
    "DDIM, 6 steps": {"num_inference_steps": 6},
    "DDIM, 4 steps": {"num_inference_steps": 4},
    "DDIM, 2 steps": {"num_inference_steps": 2},
    "DPM-Solver++, 10 steps": {"sampler": "dpm-solver++", "num_inference_steps": 10},
    "DPM-Solver++, 6 steps": {"sampler": "dpm-solver++", "num_inference_steps": 6},
    "Euler, 10 steps": {"sampler": "euler", "num_inference_steps": 10},
    "guided above .4 of the noise": {"guidance_interval": [0.4, 1.0]},
    "early rejection, loss .05": {"early_rejection": {"loss": 0.05, "teach": 100}},
    "LCM, 8 steps": {"sampler": "lcm", "num_inference_steps": 8, "guidance_scale": 1.0},
    "LCM, 4 steps": {"sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0},
}
LCM = "lcm.safetensors"
"""Low-rank weights of `benchmarks/lcm.py` in the folder `--work`."""


def make_row(name: str, work: Path, seeds: int) -> dict[str, Any]:
    """Makes a row's images and measures them."""
    from benchmarks.gap import SETTINGS, write_phrases

    from discl.pipeline import generate, run_until
    from discl.recipe import load_recipe
    from discl.run_folder.open import open_run

    changes = {"levels": LEVELS, "seeds": seeds, "num_inference_steps": STEPS, **ROWS[name]}
    if changes.get("sampler") == "lcm":
        changes["loras"] = [{"path": str((work / LCM).resolve())}]
    overrides = {f"spectrum.{key}": value for key, value in changes.items()}
    overrides |= {"prompts.phrases": write_phrases(SETTINGS["half"], work), **TRAIN}
    learners = METHODS if name == next(iter(ROWS)) else {LEARNER: METHODS[LEARNER]}
    overrides["methods"] = learners
    recipe = load_recipe("fashion-lt", overrides)
    folder = work / "runs" / "".join(each if each.isalnum() else "-" for each in name)
    shutil.rmtree(folder, ignore_errors=True)  # a killed row is measured from its beginning
    run = open_run(recipe, folder)
    run_until(run, "plan")
    started = time.process_time()
    generate(run)
    seconds = time.process_time() - started
    run_until(run, "filter")
    return {**measure(run, seconds, work), "few": few_accuracy(run)}


def few_accuracy(run: Any) -> dict[str, list[float]]:
    """Test accuracy on few classes of each method, by training seed."""
    from discl.pipeline import compare
    from discl.run_folder import paths

    compare(run, TRAIN_SEEDS)
    rows = json.loads(run.path(paths.COMPARISON_DATA).read_text())["rows"]
    return {name: rows[name]["figures"]["few"] for name in run.recipe.methods}


def measure(run: Any, seconds: float, work: Path) -> dict[str, Any]:
    """The figures of a finished run."""
    import numpy as np

    from discl.run_folder import paths
    from discl.spectrum.plan import read_plan
    from discl.stages.budget import count_rows
    from discl.stages.pending import known_scores, scorer_of
    from discl.stages.rejection import count_rejections
    from discl.utils.stored import read_table

    plan = read_plan(run.path(paths.PLAN))
    rejections = count_rejections(run, scorer_of(run), plan, known_scores(run))
    rows = count_rows(run, plan) - rejections.rows_saved
    verdicts = read_table(run.path(paths.FILTER)).to_pylist()
    kept = sum(each["keep"] for each in verdicts)
    scores = np.array([each["clip_similarity"] for each in verdicts if each["keep"]])
    found = {
        "images": len(plan),
        "kept": kept,
        "unet_rows": rows,
        "unet_rows_per_kept": rows / max(kept, 1),
        "processor_seconds": seconds,
        "processor_seconds_per_kept": seconds / max(kept, 1),
        "clip_similarity_of_kept": float(scores.mean()) if kept else None,
        **compare_with_real(run, verdicts, work),
    }
    if run.recipe.spectrum.early_rejection is not None:
        found["rejected"] = rejections.rejected
        found["audited"], found["audited_kept"] = rejections.audited, rejections.audited_kept
        found["measured_loss"] = rejections.loss
    return found


def compare_with_real(run: Any, verdicts: list[dict[str, Any]], work: Path) -> dict[str, Any]:
    """Precision and coverage of kept images, class by class, weighted by the real images."""
    import numpy as np
    import torch
    from benchmarks.gap import train_referee

    from discl.data import decode_image, to_square
    from discl.run_folder.images import stored_images
    from discl.utils.hashing import digest, digest_file

    referee = train_referee("fashion", work, None)
    told = digest_file(work / "referees" / "fashion.safetensors")

    def features(pictures: list[Any]) -> Any:
        pixels = torch.from_numpy(np.stack([to_square(each, 32) for each in pictures]))
        with torch.inference_mode():
            found = referee[:-1](pixels.permute(0, 3, 1, 2).float() / 255 - 0.5)
        return torch.nn.functional.normalize(found, dim=1).numpy()

    kept = [each for each in verdicts if each["keep"]]
    kept.sort(key=lambda each: digest("lossy", each["source_id"], each["seed"], each["level"]))
    kept = kept[:COMPARED]
    images = stored_images(run, [each["id"] for each in kept])
    made = features([decode_image(images[row]["image"]) for row in range(len(kept))])
    labels = np.array([each["label"] for each in kept])
    test = run.tables["test"]
    figures, weights = [], []
    for label in np.unique(labels).tolist():
        real = features([test.image(row) for row in np.flatnonzero(test.labels == label).tolist()])
        figures.append(precision_and_coverage(made[labels == label], real))
        weights.append(len(real))
    precision, coverage = np.average(np.array(figures), axis=0, weights=weights).tolist()
    return {
        "compared": len(kept),
        "precision": precision,
        "coverage": coverage,
        "referee": told,
    }


def precision_and_coverage(made: Any, real: Any, neighbours: int = 5) -> tuple[float, float]:
    """Of features of length 1; a ball reaches to the fifth-nearest other real image."""
    import numpy as np

    radii = np.sort(1 - real @ real.T, axis=1)[:, neighbours]
    inside = (1 - made @ real.T) <= radii
    return float(inside.any(1).mean()), float(inside.any(0).mean())


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as Markdown, relative to the first row where they are costs."""
    first = next(iter(rows.values()))
    lines = [
        "| choice | UNet rows | UNet rows per kept image | processor time per kept image | kept "
        "| clip_similarity of kept | precision | coverage | few |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        costs = [
            f"{row[key] / first[key]:.2f}"
            for key in ("unet_rows", "unet_rows_per_kept", "processor_seconds_per_kept")
        ]
        lines.append(
            f"| {name} | {' | '.join(costs)} | {row['kept'] / row['images']:.0%} | "
            f"{row['clip_similarity_of_kept']:.3f} | {row['precision']:.2f} | "
            f"{row['coverage']:.2f} | {_points(row, LEARNER)} |"
        )
    control = _points(first, CONTROL)
    return "\n".join([*lines, "", f"The same mixture without synthetic images: {control} on few."])


def _points(row: Mapping[str, Any], method: str) -> str:
    """Mean ± standard deviation in per cent; a dash where nothing was trained."""
    values = row.get("few", {}).get(method)
    if not values:
        return "–"
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/lossy"))
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--table", action="store_true", help="print the committed figures")
    asked = parser.parse_args()
    if asked.table:
        print(table(json.loads(asked.json.read_text())["rows"]))
        return
    folder = asked.work / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"steps": STEPS, "seeds": asked.seeds, "levels": LEVELS, "neighbours": 5}
    stored = json.loads(asked.json.read_text()) if asked.json.exists() else {}
    found = stored["rows"] if stored.get("settings") == settings else {}
    for name in asked.rows:
        file = folder / f"{name}.json"
        if not file.exists():
            values = make_row(name, asked.work, asked.seeds)
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(values, indent=2))
            unfinished.replace(file)
            print(f"{name}: {values}", flush=True)
        found[name] = json.loads(file.read_text())
    found = {name: found[name] for name in ROWS if name in found}
    if len({row["referee"] for row in found.values()}) > 1:
        raise SystemExit(f"{asked.json} has rows of another referee; run all of them in one --work")
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps({"settings": settings, "rows": found}, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
