"""Opening a data set of a million entries: seconds and peak memory of every reader.

    python benchmarks/readers.py --entries 1000000 --json benchmarks/results/readers.json

A synthetic tree of each format is written below `--work`. Lists name images that need not exist to
open a table. The image folder and the tar shards repeat one tiny image. Each reader opens its tree
in a separate process, which also reads all ids and labels and counts the classes, as every run
does. The base is the memory of such a process before it opens anything. The goal applies to the
processor time of all threads together, which other work on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = 1000
GOAL_SECONDS, GOAL_BYTES = 30.0, 1e9


def picture() -> bytes:
    """A tiny JPEG."""
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 127, np.uint8)).save(out, "JPEG")
    return out.getvalue()


def name_of(row: int) -> str:
    return f"class_{row % CLASSES:04d}/picture_{row:08d}.jpg"


def make_lists(root: Path, entries: int) -> None:
    text = "".join(f"train/{name_of(row)} {row % CLASSES}\n" for row in range(entries))
    (root / "ImageNet_LT_train.txt").write_text(text)
    for split in ("val", "test"):
        (root / f"ImageNet_LT_{split}.txt").write_text(f"{split}/{name_of(0)} 0\n")


def make_manifest(root: Path, entries: int) -> None:
    lines = (f"{name_of(row)},class {row % CLASSES},camera {row % 300}\n" for row in range(entries))
    (root / "images.csv").write_text("path,label,domain\n" + "".join(lines))


def make_inaturalist(root: Path, entries: int) -> None:
    content = {
        "images": [
            {"id": row, "file_name": f"train_val2018/{name_of(row)}", "width": 800, "height": 600}
            for row in range(entries)
        ],
        "annotations": [
            {"id": row, "image_id": row, "category_id": row % CLASSES} for row in range(entries)
        ],
        "categories": [{"id": label, "name": f"class {label}"} for label in range(CLASSES)],
    }
    (root / "train2018.json").write_text(json.dumps(content))


def make_wilds(root: Path, entries: int) -> None:
    lines = (
        f"train,{row % CLASSES},{row:08d}.jpg,{row % 300},{row // 3}\n" for row in range(entries)
    )
    others = (f"{split},0,{split}.jpg,0,0\n" for split in ("id_val", "id_test", "val", "test"))
    (root / "metadata.csv").write_text(
        "split,y,filename,location_remapped,sequence_remapped\n" + "".join([*lines, *others])
    )
    (root / "categories.csv").write_text(
        "y,name\n" + "".join(f"{label},animal {label}\n" for label in range(CLASSES))
    )


def make_parquet(root: Path, entries: int) -> None:
    content, shards = picture(), max(entries // 100_000, 1)
    for number, rows in enumerate(np.array_split(np.arange(entries), shards)):
        images = [{"bytes": content, "path": None}] * len(rows)
        table = pa.table(
            {"id": [f"{row:08d}" for row in rows], "image": images, "label": rows % CLASSES}
        )
        pq.write_table(table, root / f"train-{number:05d}.parquet")


def make_image_folder(root: Path, entries: int) -> None:
    content = picture()
    for label in range(CLASSES):
        (root / f"class_{label:04d}").mkdir()
    for row in range(entries):
        (root / name_of(row)).write_bytes(content)


def make_webdataset(root: Path, entries: int) -> None:
    content, shards = picture(), max(entries // 10_000, 1)
    for number, rows in enumerate(np.array_split(np.arange(entries), shards)):
        with tarfile.open(root / f"train-{number:06d}.tar", "w") as tar:
            for row in rows:
                for suffix, data in (("jpg", content), ("cls", str(row % CLASSES).encode())):
                    member = tarfile.TarInfo(f"{row:08d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


TREES: dict[str, Callable[[Path, int], None]] = {
    "imagenet-lt": make_lists,
    "manifest": make_manifest,
    "inaturalist": make_inaturalist,
    "wilds": make_wilds,
    "parquet": make_parquet,
    "imagefolder": make_image_folder,
    "webdataset": make_webdataset,
}


def peak_bytes() -> int:
    """Peak resident memory of this process; `getrusage` would include that of its parent."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def open_one(root: str, kind: str) -> dict[str, float]:
    """What opening costs in this process."""
    from discl.data import read_tables

    base = peak_bytes()
    started, busy = time.perf_counter(), time.process_time()
    table = read_tables(root, kind)["train"]
    rows, classes = len(table.ids), int((table.class_counts > 0).sum())
    return {
        "rows": rows,
        "classes": classes,
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - busy,
        "base_bytes": base,
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/readers"),
        help="where the trees are made; a disk in memory spares time",
    )
    parser.add_argument("--formats", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--open", nargs=2, metavar=("ROOT", "FORMAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(open_one(*arguments.open)))
        return
    results = {}
    print(
        "| format | entries | elapsed, s | processor, s | peak, MB | of which base "
        f"| goals ({GOAL_SECONDS:.0f} s, 1 GB) |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for kind in arguments.formats:
        root = arguments.work / kind
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        TREES[kind](root, arguments.entries)
        command = [sys.executable, __file__, "--open", str(root), kind]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[kind] = each = json.loads(told.splitlines()[-1])
        if each["rows"] != arguments.entries or each["classes"] != min(CLASSES, arguments.entries):
            raise SystemExit(
                f"{kind}: {each['rows']} rows of {each['classes']} classes were read; "
                f"{arguments.entries} were written."
            )
        met = (
            "met"
            if each["processor_seconds"] <= GOAL_SECONDS and each["peak_bytes"] <= GOAL_BYTES
            else "missed"
        )
        print(
            f"| {kind} | {each['rows']:,} | {each['seconds']:.1f} "
            f"| {each['processor_seconds']:.1f} | {each['peak_bytes'] / 1e6:.0f} "
            f"| {each['base_bytes'] / 1e6:.0f} | {met} |",
            flush=True,
        )
        shutil.rmtree(root)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"entries": arguments.entries, "readers": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
