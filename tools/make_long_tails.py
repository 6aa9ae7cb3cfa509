"""Writes `long_tails/cifar100.txt`: the training images of CIFAR100-LT, by content.

    python tools/make_long_tails.py --cifar100 DIR

DIR has the training images as Parquet files, with the original file names as ids. Images are drawn
by (seed 0, file name), for 500 images of the first class and imbalance ratio 10. Within each class
the images of ratios 50 and 100 come first. A line is the first twelve hexadecimal digits of the
`digest_image` of an image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from discl.data import digest_image, exponential_counts, read_tables
from discl.data.long_tail import INDEX_CHARACTERS
from discl.utils.hashing import derive_seed

ASSETS = Path(__file__).parents[1] / "src" / "discl" / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar100", required=True)
    parser.add_argument("--target", type=Path, default=ASSETS / "long_tails" / "cifar100.txt")
    arguments = parser.parse_args()
    table = read_tables(arguments.cifar100)["train"]
    ids, labels, lines = table.ids, table.labels, []
    for label, count in enumerate(exponential_counts(len(table.class_names), 500, 10)):
        rows = [row for row in range(len(table)) if labels[row] == label]
        rows.sort(key=lambda row: derive_seed("long-tail", 0, ids[row]))
        lines += [digest_image(table.image(row))[:INDEX_CHARACTERS] for row in rows[:count]]
    arguments.target.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} images, {len(set(lines))} of them different")


if __name__ == "__main__":
    main()
