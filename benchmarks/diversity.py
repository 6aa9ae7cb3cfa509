"""Distances between the images of a finished run, per level.

    python benchmarks/diversity.py build/fashion_lt/seed-0 [--json FILE]

Distances are mean absolute differences of pixels in [0, 1]: of a synthetic image from its source,
between images of one source at a level (other seeds), and between real images of one class.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from discl.data import decode_image, to_square
from discl.run_folder.images import stored_images
from discl.run_folder.open import open_run


def measure(folder: Path) -> list[dict[str, float]]:
    """One row per level, and one for the real images themselves."""
    run = open_run(folder / "recipe.yaml", folder)
    rows = pq.read_table(folder / "filter.parquet").to_pylist()
    stored = stored_images(run, [row["id"] for row in rows])
    size = run.sampling.size
    pictures = [
        to_square(decode_image(stored[row]["image"]), size) / 255.0 for row in range(len(rows))
    ]
    places = {name: row for row, name in enumerate(run.train.ids)}
    sources = {
        name: to_square(run.train.image(places[name]), size) / 255.0
        for name in {row["source_id"] for row in rows}
    }
    result = []
    for level in sorted({row["level"] for row in rows}):
        chosen = [
            (row["source_id"], picture)
            for row, picture in zip(rows, pictures, strict=True)
            if row["level"] == level
        ]
        away = np.mean([np.abs(picture - sources[source]).mean() for source, picture in chosen])
        apart = [
            np.abs(first[1] - second[1]).mean()
            for first, second in combinations(chosen, 2)
            if first[0] == second[0]
        ]
        result.append(
            {"level": level, "from_source": float(away), "between_seeds": float(np.mean(apart))}
        )
    labels = {row["source_id"]: row["label"] for row in rows}
    real = [
        np.abs(sources[a] - sources[b]).mean()
        for a, b in combinations(sorted(sources), 2)
        if labels[a] == labels[b]
    ]
    return [*result, {"level": 100, "from_source": 0.0, "between_seeds": float(np.mean(real))}]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = measure(arguments.folder)
    print("level   from source   between seeds (last row: between real images of a class)")
    for row in figures:
        print(f"{row['level']:4d} % {row['from_source']:12.3f} {row['between_seeds']:14.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
