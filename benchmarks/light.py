"""Light tuning of a CLIP on CIFAR100-LT, ratio 100, with and without a spectrum: three seeds.

    python benchmarks/light.py --data DIR     # everything that is missing, then the table
    python benchmarks/light.py                # the table, from results/light
    python benchmarks/light.py --data DIR --methods light light-la --processes 1
    python benchmarks/light.py --data DIR --results build/try --set train.steps_per_epoch=4

DIR has CIFAR-100 as Parquet. The rows are in light.yaml; the machinery is that of cifar100_lt.py.
Each training is a unit whose figures and predictions are written when it ends. A unit that is there
is not run again.

- Every row has three trials, its learning rate, a third and three times of it, and a fourth beyond
  if the best is at an end. They are evaluated on a held-out fifth of the long-tailed set.
- Then every row trains with its best rate on the whole set, and its last epoch counts.
- The spectrum is that of cifar100_lt.py: copy its folder `spectrum` into `--work` to save its cost.
- The verdicts of `light-levels-difficulty` come from cross-fitted classifiers: this CLIP, tuned
  with the settings of `full-la` but cross-entropy, on two folds.
"""

from __future__ import annotations

from pathlib import Path

import cifar100_lt

HERE = Path(__file__).parent
RECIPE = HERE / "light.yaml"
RESULTS = HERE / "results" / "light"
FILTERS = {"light-levels-difficulty": {"rule": "difficulty", "band": [0.05, 0.95]}}
EXPECTED = (
    # Written before anything was run.
    # Light tuning is ahead of full tuning on few,
    ("few", "light", "flyp", 0),
    ("few", "light-la", "full-la", 0),
    ("few", "light-la", "light", 0),
    ("few", "light-balanced", "light", 0),
    ("few", "light-crt", "light", 0),
    # and a spectrum adds a point on few to the same mixture of real images.
    ("few", "light-text-la", "light-repeat-la", 1),
    ("few", "light-levels-la", "light-repeat-la", 1),
    ("few", "light-discl-la", "light-repeat-la", 1),
    ("few", "light-text-balanced", "light-balanced", 1),
    ("few", "light-levels-balanced", "light-balanced", 1),
    ("few", "light-discl-balanced", "light-balanced", 1),
    ("all", "light-discl-la", "light-la", 0),
    # Each option is ahead of all levels without it.
    ("all", "light-levels-weight", "light-levels-la", 0),
    ("all", "light-levels-fading", "light-levels-la", 0),
    ("all", "light-levels-finish", "light-levels-la", 0),
    ("few", "light-levels-head", "light-levels-la", 0),
    ("few", "light-levels-difficulty", "light-levels-la", 0),
)
"""(column, row, other row, points of expected gain); open if the interval contains them."""


def main() -> None:
    arguments = cifar100_lt.make_parser(__doc__, "build/light", RESULTS).parse_args()
    job = cifar100_lt.read_job(
        arguments, RECIPE, expected=EXPECTED, families={}, oracle=False, filters=FILTERS
    )
    cifar100_lt.carry_on(job, arguments.processes, arguments.minutes)


if __name__ == "__main__":
    main()
