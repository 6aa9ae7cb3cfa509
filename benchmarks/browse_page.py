"""How fast the page of `discl browse` is with 100,000 images, in headless Chromium.

    python -m benchmarks.browse_page --json benchmarks/results/browse_page.json
    python -m benchmarks.browse_page --table benchmarks/results/browse_page.json  # the table only

The store is that of `benchmarks.browse`. The command is started as a user starts it. Then come the
first picture, moves of the slider, and jumps through the grid. A move counts from the event to the
drawn frame: new verdicts of all rows, counts, histogram, scales and the visible images. Times are
wall-clock, with the processor time of the page's main thread below them, because other processes
may work on the machine.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.browse import Server, measure_again, read_options
from benchmarks.figures import Figure
from playwright.sync_api import Page, sync_playwright

MOVES, JUMPS = 60, 40
GOAL_FIRST, GOAL_MOVE = 2.0, 0.1
FIRST = """new Promise((done) => {
  const found = () => document.querySelector('#grid .cell img.there');
  const wait = () => (found() ? done(performance.now()) : requestAnimationFrame(wait));
  wait();
})"""
DRAWN = """const drawn = () => new Promise((done) => requestAnimationFrame(() => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = done;
  port2.postMessage(0);
}));"""
MOVE = f"""async (value) => {{
  {DRAWN}
  const slider = document.getElementById('cut');
  const start = performance.now();
  slider.value = value;
  slider.dispatchEvent(new Event('input'));
  await drawn();
  return performance.now() - start;
}}"""
JUMP = f"""async (part) => {{
  {DRAWN}
  const grid = document.getElementById('grid');
  const start = performance.now();
  grid.scrollTop = part * (grid.scrollHeight - grid.clientHeight);
  await drawn();
  return [performance.now() - start, grid.querySelectorAll('.cell').length];
}}"""
LOADED = """() => [...document.querySelectorAll('#grid .cell img')].every(
  (each) => each.classList.contains('there'))"""


def measure(run: Path, chromium: str) -> list[Figure]:
    """The figures of one visit."""
    server = Server(run)
    try:
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1360, "height": 860})
            page.set_default_timeout(120_000)
            found = _visit(page, server)
            browser.close()
    finally:
        server.stop()
    return found


def _visit(page: Page, server: Server) -> list[Figure]:
    port = server.address.rpartition(":")[2]
    name, _, key = server.headers["Cookie"].partition("=")
    page.context.add_cookies([{"name": name, "value": key, "url": f"http://127.0.0.1:{port}"}])
    client = page.context.new_cdp_session(page)
    client.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(server.address)
    shown = page.evaluate(FIRST) / 1000
    first, busy_first = server.seconds, busy_seconds(client)
    page.wait_for_function(LOADED)
    moves, busy = [], busy_seconds(client)
    low, high = (float(page.get_attribute("#cut", name) or 0) for name in ("min", "max"))
    for value in np.random.default_rng(0).uniform(low, high, MOVES):
        moves.append(page.evaluate(MOVE, float(value)))
    busy_move = (busy_seconds(client) - busy) / MOVES
    jumps, busy = [], busy_seconds(client)
    for part in np.random.default_rng(1).uniform(0, 1, JUMPS):
        jumps.append(page.evaluate(JUMP, float(part)))
    busy_jump = (busy_seconds(client) - busy) / JUMPS
    page.wait_for_function(LOADED)
    rows = int("".join(filter(str.isdigit, page.text_content("#shown") or "")))
    times, cells = np.array(jumps).T
    return [
        Figure("images", rows),
        Figure("start of the command to the first picture, s", first),
        Figure("address to the first picture, s", shown),
        Figure("… of the processor, s", busy_first, "<=", GOAL_FIRST),
        Figure("move of the slider, median, s", float(np.median(moves)) / 1000, "<=", GOAL_MOVE),
        Figure("… the slowest of 60, s", max(moves) / 1000),
        Figure("… of the processor, s", busy_move, "<=", GOAL_MOVE),
        Figure("jump in the grid, median, s", float(np.median(times)) / 1000),
        Figure("… of the processor, s", busy_jump),
        Figure("images in the document, most", float(cells.max())),
    ]


def busy_seconds(client: Any) -> float:
    """Seconds of the processor that the page's main thread has taken."""
    metrics = client.send("Performance.getMetrics")["metrics"]
    return float(next(each["value"] for each in metrics if each["name"] == "TaskDuration"))


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = read_options(__doc__, arguments)
    if chosen is None:
        return
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("this benchmark needs Chromium in the PATH.")
    measure_again(partial(measure, chromium=chromium), chosen)


if __name__ == "__main__":
    main()
