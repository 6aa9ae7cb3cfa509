"""How long `discl audit` takes on 100,000 photos, and whether it finds copies among them.

    python -m benchmarks.audit_speed CIFAR10 CIFAR100 --json benchmarks/results/audit_speed.json

`CIFAR10` and `CIFAR100` are folders with Parquet (`uoft-cs/cifar10` and `uoft-cs/cifar100` on the
hub). Their training images, 50,000 each, become one training split. The command runs as a user runs
it, from reading the data to the table of findings. Then copies of some images are searched for
among all. Times are processor time, with one thread per library. Memory is the peak of the command.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from datasets import ClassLabel, Features, Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from discl import read_tables
from discl.audit.coefficients import SIDE
from discl.audit.copies import find_copies, make_thumbnail
from discl.audit.table import read_findings
from discl.run_folder import paths
from helpers.planted import PLANTED, all_together

TREE = {
    "name": "speed",
    "spectrum": {"checkpoint": "not-needed", "levels": [50]},
    "filter": {"checkpoint": "not-needed", "threshold": 0.2},
    "methods": {"baseline": {"strategy": "real-only"}},
}
"""A recipe; the audit of real images loads no checkpoint."""
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}


def gather(folders: list[Path], target: Path, most: int) -> None:
    """Writes the training images of all folders as one training split."""
    tables, names = [], []
    for folder in folders:
        table = pq.read_table(folder / "train.parquet", columns=["image", "label"])
        listed = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]
        label = pc.add(table["label"], len(names))
        tables.append(table.set_column(1, "label", label).replace_schema_metadata())
        names += [f"{folder.name} {name}" for name in listed["names"]]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    every = pa.concat_tables(tables)
    rows = np.sort(np.random.default_rng(0).permutation(len(every))[:most])
    target.mkdir()
    chosen = every.take(rows).replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(chosen, target / "train.parquet", row_group_size=1000)


def measure_command(data: Path, folder: Path) -> dict[str, Any]:
    """Processor time, memory and findings of `discl audit` in a process of its own."""
    recipe = folder / "speed.yaml"
    recipe.write_text(yaml.safe_dump(TREE | {"data": {"root": str(data)}}))
    command = [
        sys.executable,
        "-m",
        "discl.cli",
        "audit",
        str(recipe),
        "--out",
        str(folder / "run"),
    ]
    subprocess.run(command, check=True, env={**os.environ, **ONE_THREAD})
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    findings = read_findings(folder / "run" / paths.AUDIT)
    return {
        "images": pq.read_metadata(data / "train.parquet").num_rows,
        "processor minutes": round((used.ru_utime + used.ru_stime) / 60, 2),
        "peak memory, GB": round(used.ru_maxrss / 2**20, 2),
        "findings": dict(Counter(each.kind for each in findings)),
    }


def measure_recall(data: Path, run: Path, queries: int) -> dict[str, Any]:
    """Recall of each kind of copy among all images, and images taken for one of another class."""
    train = read_tables(str(data))["train"]
    shards = sorted((run / paths.AUDITED / paths.THUMBNAILS).glob("*.parquet"))
    stored = pa.concat_tables(
        [pq.read_table(shard, columns=["id", "thumbnail"]) for shard in shards]
    )
    listed = b"".join(stored["thumbnail"].to_pylist())
    known = np.frombuffer(listed, np.uint8).reshape(-1, SIDE, SIDE)
    row_of = {each.tobytes(): row for row, each in enumerate(known)}
    rows = np.random.default_rng(1).permutation(len(train))[:queries].tolist()
    places = [row_of[make_thumbnail(train.image(row)).tobytes()] for row in rows]
    planted, kinds = [], {**PLANTED, "all together": all_together}
    for change in kinds.values():
        random = np.random.default_rng(2)
        planted += [make_thumbnail(change(train.image(row), random)) for row in rows]
    started = time.process_time()
    found = find_copies(np.stack(planted), known)
    seconds = time.process_time() - started
    pairs = set(zip(found.queries.tolist(), found.references.tolist(), strict=True))
    hits = [(place, places[place % queries]) in pairs for place in range(len(planted))]
    means = np.reshape(hits, (len(kinds), queries)).mean(1).round(4).tolist()
    return {"queries": queries, "recall": dict(zip(kinds, means, strict=True)), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gather(arguments.folders, folder / "data", arguments.images)
        results = measure_command(folder / "data", folder)
        results |= measure_recall(folder / "data", folder / "run", arguments.queries)
    print(json.dumps(results, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
