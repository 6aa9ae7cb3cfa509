"""How long `discl browse` takes on 100,000 images, and how much memory.

    python -m benchmarks.browse --json benchmarks/results/browse.json
    python -m benchmarks.browse --table benchmarks/results/browse.json      # the table only

A store of 100,000 rows is written as tables, with 16 different pictures of 64 pixels. The command
is started as a user starts it, and asked what the page asks: the run, its columns, and the first 60
thumbnails. Then come what a long visit adds: real images (which load torch and `datasets`), the
neighbours of images among 100,000 embeddings of 512 numbers, and thumbnails all over the store.
Times are wall-clock. The goal is on the processor time of the server, because other processes may
work on the machine; the load average says how many. Memory is the peak of the server (VmHWM).
`benchmarks.browse_page` measures slider and scrolling in Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from benchmarks.figures import Figure, as_rows, from_rows, table

from discl.run_folder import paths
from discl.spectrum.embeddings import SCHEMA
from discl.utils.hashing import digest
from helpers.browsed import decode_columns, make_browsed

LEVELS, SEEDS, CLASSES, SIDE = (0, 10, 30, 50, 70), 8, 100, 64
FIRST_VIEW, VISITED, WIDTH = 60, 1500, 512
GOAL_SECONDS, GOAL_GIGABYTES = 2.0, 1.0


class Server:
    """`discl browse` in a process of its own."""

    def __init__(self, run: Path) -> None:
        self.started = time.perf_counter()
        command = [sys.executable, "-m", "discl.cli", "browse", str(run), "--no-open"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        address, _, key = self.process.stdout.readline().strip().partition("/?key=")
        self.address, port = address, address.rpartition(":")[2]
        self.headers = {"Cookie": f"discl-{port}={key}"}

    def get(self, path: str) -> bytes:
        """The answer to a request."""
        asked = urllib.request.Request(self.address + path, headers=self.headers)
        with urllib.request.urlopen(asked, timeout=300) as answer:
            return answer.read()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started

    @property
    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def gigabytes(self) -> float:
        """Peak of the memory so far."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def make_store(folder: Path, rows: int) -> Path:
    """A run folder with so many images and their embeddings."""
    sources = rows // (len(LEVELS) * SEEDS)
    names = [f"class {number:03d}" for number in range(CLASSES)]
    run = make_browsed(
        folder,
        sources=sources,
        levels=LEVELS,
        seeds=SEEDS,
        classes=names,
        shard_rows=512,
        side=SIDE,
    )
    ids = pq.read_table(run / paths.PLAN, columns=["id"])["id"].to_pylist()
    ids += pq.read_table(run / paths.HARD, columns=["digest"])["digest"].to_pylist()
    below = run / paths.PILOT / paths.CACHED_EMBEDDINGS
    below.mkdir(parents=True)
    random = np.random.default_rng(0)
    for first in range(0, len(ids), 4096):
        part = ids[first : first + 4096]
        vectors = random.standard_normal((len(part), WIDTH)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        lists = pa.FixedSizeListArray.from_arrays(vectors.ravel(), WIDTH)
        columns = [part, ["clip"] * len(part), lists.cast(SCHEMA.field("embedding").type)]
        shard = paths.SHARD.format(digest(part))
        pq.write_table(pa.table(columns, schema=SCHEMA), below / shard)
    return run


def measure(run: Path) -> list[Figure]:
    """The figures of one visit."""
    load = os.getloadavg()[0]
    server = Server(run)
    try:
        printed = server.seconds
        about = json.loads(server.get("/api/run"))
        _, columns = decode_columns(server.get("/api/columns"))
        answered = server.seconds
        ids, rows = columns["id"], about["counts"]["stored"]
        server.get(f"/image/{ids[0]}?size=thumb")
        first, processor = server.seconds, server.processor_seconds
        for name in ids[1:FIRST_VIEW]:
            server.get(f"/image/{name}?size=thumb")
        view, gigabytes = server.seconds, server.gigabytes
        server.get(f"/real/{columns['source_digest'][0]}?size=thumb")
        real = server.seconds - view
        for name in np.random.default_rng(0).choice(ids, VISITED, replace=False):
            server.get(f"/image/{name}?size=thumb")
        before = time.perf_counter()
        server.get(f"/api/neighbours/{ids[0]}")
        loaded = time.perf_counter()
        server.get(f"/api/neighbours/{ids[-1]}")
        again = time.perf_counter()
        last = server.gigabytes
    finally:
        server.stop()
    return [
        Figure("images", rows),
        Figure("start to the first picture, s", first, detail=f"load average {load:.1f}"),
        Figure("… of the processor, s", processor, "<=", GOAL_SECONDS),
        Figure("start to the address, s", printed),
        Figure("start to run and columns, s", answered),
        Figure(f"start to {FIRST_VIEW} pictures, s", view),
        Figure("memory of the first view, GB", gigabytes, "<=", GOAL_GIGABYTES),
        Figure("first real picture, s", real, detail="loads torch and datasets"),
        Figure("first neighbours, s", loaded - before, detail="reads all embeddings"),
        Figure("further neighbours, s", again - loaded),
        Figure("memory of a long visit, GB", last, "<=", GOAL_GIGABYTES),
    ]


def read_options(doc: str, arguments: Sequence[str] | None) -> argparse.Namespace | None:
    """The options of a benchmark of `discl browse`; None if it has only printed a table."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--store", type=Path, help="folder of the store; default a temporary one")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--table", type=Path, help="only print this file")
    chosen = parser.parse_args(arguments)
    if chosen.table is None:
        return chosen
    print(table(from_rows(json.loads(chosen.table.read_text())["figures"])))
    return None


def measure_again(measure: Callable[[Path], list[Figure]], chosen: argparse.Namespace) -> None:
    """Prints and writes the figures of a second visit, which `measure` returns for a run folder.

    From the first one on files are in the system's memory, as after generation.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.store or Path(temporary)
        run = folder / "run" if (folder / "run").is_dir() else make_store(folder, chosen.rows)
        measure(run)
        figures = measure(run)
    print(table(figures))
    if chosen.json:
        chosen.json.write_text(json.dumps({"figures": as_rows(figures)}, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = read_options(__doc__, arguments)
    if chosen is not None:
        measure_again(measure, chosen)


if __name__ == "__main__":
    main()
