"""The page of `discl browse` in headless Chromium: what a person sees, and what it saves."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from discl.browse import server
from discl.browse.rows import VERDICTS, pack_columns
from discl.run_folder import paths
from discl.run_folder.overrides import read_overrides
from discl.spectrum.plan import read_plan
from discl.spectrum.store import spectrum_shards
from helpers.browsed import HOSTILE, add_images, make_browsed

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from benchmarks.browse_page import MOVE, busy_seconds  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]

CLASSES = ("<b>bag</b>", HOSTILE, "hat")
SOURCES, LEVELS, SEEDS = 60, (0, 50), 3
MADE = SOURCES * len(LEVELS) * SEEDS - 12
"""Images that are there at first; the others are made while a person looks."""


class Site:
    """A run folder that is served, and one window of a browser on it.

    - `amended`: the thresholds that were applied.
    - `errors`: of the page's scripts.
    """

    def __init__(self, run: Path, address: str, context: Any, amended: list[Any]) -> None:
        self.run, self.address, self.context, self.amended = run, address, context, amended
        self.errors: list[str] = []
        self.page = self.open()

    def open(self) -> Any:
        page = self.context.new_page()
        page.set_viewport_size({"width": 1280, "height": 800})
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda line: line.type == "error" and self.errors.append(line.text))
        page.goto(self.address)
        page.wait_for_selector("body.loaded")
        return page

    def again(self) -> Any:
        """The page as a person finds it who opens it now: a new tab, in front of the others."""
        (self.run / paths.OVERRIDES).unlink(missing_ok=True)
        before, self.page = self.page, self.open()
        before.close()
        self.page.bring_to_front()  # keys do not reach a tab behind others
        self.page.wait_for_selector("body.loaded .cell")
        self.page.focus("#grid")
        return self.page

    def saved(self, number: int) -> dict[str, tuple[str, str]]:
        """`{id: (verdict, tag)}` of the file, once it has so many rows."""
        self.wait(lambda: len(read_overrides(self.run)) == number)
        found = read_overrides(self.run)
        return {name: (each.verdict, each.tag) for name, each in found.items()}

    def wait(self, done: Callable[[], bool]) -> None:
        for _ in range(1000):
            if done():
                return
            self.page.wait_for_timeout(30)
        raise AssertionError("the page has not saved it")

    def order(self) -> list[str]:
        """Ids as the page shows them: by class, source, level and seed."""
        plan = {each.id: each for each in read_plan(self.run / paths.PLAN)}
        stored = set(spectrum_shards(self.run / paths.SPECTRUM, CLASSES).ids())
        return sorted(
            stored,
            key=lambda name: (
                plan[name].label,
                plan[name].source_id,
                plan[name].level,
                plan[name].seed,
            ),
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    run = make_browsed(
        tmp_path_factory.mktemp("page"),
        sources=SOURCES,
        levels=LEVELS,
        seeds=SEEDS,
        classes=CLASSES,
        stored=range(MADE),
        shard_rows=512,
    )
    amended: list[Any] = []
    with served(run, amended.append) as address, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(reduced_motion="reduce")
        context.set_default_timeout(60_000)
        yield Site(run, address, context, amended)
        browser.close()


class served:
    """The address of a run folder that a thread serves."""

    def __init__(self, run: Path, amend: Callable[[Any], None]) -> None:
        self.ready, self.address = threading.Event(), ""
        words = {"show": False, "on_start": self.started}
        self.thread = threading.Thread(target=server.serve, args=(run, amend), kwargs=words)

    def started(self, address: str) -> None:
        self.address = address
        self.ready.set()

    def __enter__(self) -> str:
        import uvicorn

        self.real = uvicorn.Server.run

        def remembered(own: uvicorn.Server, sockets: Any = None) -> None:
            self.server = own
            self.real(own, sockets)

        uvicorn.Server.run = remembered  # type: ignore[method-assign]
        self.thread.start()
        assert self.ready.wait(30)
        return self.address

    def __exit__(self, *_: object) -> None:
        import uvicorn

        uvicorn.Server.run = self.real  # type: ignore[method-assign]
        self.server.should_exit = True
        self.thread.join(20)


def text_of(page: Any, name: str) -> str:
    return page.text_content(f"#{name}").replace("\u2009", "").strip()


def test_the_slider_counts_as_numpy_does(site: Site) -> None:
    page = site.again()
    verdicts = pq.read_table(site.run / paths.FILTER)
    score = verdicts["clip_similarity"].to_numpy()[:MADE]
    level = verdicts["level"].to_numpy()[:MADE]
    label = verdicts["label"].to_numpy()[:MADE]
    hard = np.bincount(np.arange(SOURCES) % len(CLASSES))
    for threshold in (0.0, -0.4, 0.713, 0.9, 1.0):
        page.fill("#cut-number", f"{threshold}")
        page.keyboard.press("Enter")
        kept = score >= threshold
        assert text_of(page, "kept").startswith(f"{kept.sum()} of {MADE} kept")
        rows = [each.split() for each in page.locator("#by-level tr").all_inner_texts()]
        for row, own in zip(rows, LEVELS, strict=True):
            assert row[-2] == f"{(kept & (level == own)).sum()}/{(level == own).sum()}"
        drawn = np.minimum(np.bincount(label[kept], minlength=len(CLASSES)), 3 * hard).sum()
        assert text_of(page, "scale") == f"{drawn / hard.sum():.2f}"
    page.evaluate("cut.value = 0.5; cut.dispatchEvent(new Event('input'))")
    assert text_of(page, "kept").startswith(f"{(score >= 0.5).sum()} of ")
    assert page.input_value("#cut-number") == "0.5"
    above = [f"{each:.3f}" for each in np.sort(score[score >= 0.5])[:6]]
    below = [f"{each:.3f}" for each in np.sort(score[score < 0.5])[-6:]]
    page.wait_for_selector(f"#nearest-above li >> text={above[0]}")
    assert page.locator("#nearest-above li").all_inner_texts() == above
    assert page.locator("#nearest-below li").all_inner_texts() == below
    page.select_option("#filter-verdict", "kept")
    assert text_of(page, "shown") == f"{(score >= 0.5).sum()} of {MADE} images"
    page.select_option("#scope", "level:50")
    assert text_of(page, "kept").startswith(f"{((score >= 0.5) & (level == 50)).sum()} of ")
    page.select_option("#filter-verdict", "")
    page.fill("#cut-number", "-0.2")
    page.keyboard.press("Enter")
    page.select_option("#scope", "class:2")
    page.fill("#cut-number", "0.9")
    page.keyboard.press("Enter")
    page.select_option("#scope", "all")
    least = np.where(label == 2, 0.9, np.where(level == 50, -0.2, 0.5))
    assert text_of(page, "kept").startswith(f"{(score >= least).sum()} of {MADE} kept")


def test_the_lines_of_the_recipe_and_their_use(site: Site) -> None:
    page = site.again()
    page.fill("#cut-number", "0.25")
    page.keyboard.press("Enter")
    page.select_option("#scope", "level:50")
    page.fill("#cut-number", "0.5")
    page.keyboard.press("Enter")
    page.click("#use")
    page.wait_for_selector("#use-lines pre")
    lines, command = page.locator("#use-lines pre").all_inner_texts()
    assert "threshold: 0.25" in lines and "filter.threshold=0.25" in command
    assert "level_thresholds:" in lines and "'50': 0.5" in lines
    page.click("#use-apply")
    page.wait_for_selector("#use-dialog", state="hidden")
    assert site.amended == [{"filter.threshold": 0.25, "filter.level_thresholds": {"50": 0.5}}]


def test_keys_reach_the_file_and_are_taken_back(site: Site) -> None:
    page, order = site.again(), site.order()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("d")
    assert site.saved(1) == {order[1]: ("drop", "")}
    page.keyboard.press("u")
    assert site.saved(0) == {}
    page.keyboard.press("r")
    assert site.saved(1) == {order[1]: ("drop", "")}
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    assert text_of(page, "selected") == "3 selected"
    page.keyboard.press("k")
    assert site.saved(3) == dict.fromkeys(order[1:4], ("keep", ""))
    page.keyboard.press("t")
    page.keyboard.type("odd")
    page.keyboard.press("Enter")
    site.wait(lambda: {each.tag for each in read_overrides(site.run).values()} == {"odd"})
    page.keyboard.press("u")
    page.keyboard.press("Backspace")
    assert site.saved(0) == {}
    page.keyboard.press("Escape")
    assert text_of(page, "selected") == ""
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail[open]")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("k")
    assert site.saved(1) == {order[2]: ("keep", "")}
    assert text_of(page, "detail-state") == "kept by hand"
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail", state="hidden")
    assert page.evaluate("document.activeElement.id") == "grid"
    assert site.errors == []


def test_a_reload_and_another_tab_show_what_was_decided(site: Site) -> None:
    page, order = site.again(), site.order()
    other = site.open()
    page.bring_to_front()
    page.focus("#grid")
    page.keyboard.press("d")
    site.saved(1)
    other.bring_to_front()
    other.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    other.wait_for_selector(".cell.by-hand.drop")
    other.focus("#grid")
    other.keyboard.press("k")
    site.wait(lambda: read_overrides(site.run)[order[0]].verdict == "keep")
    other.close()
    page.reload()
    page.wait_for_selector(".cell.by-hand.keep")
    assert page.locator(".cell.by-hand").count() == 1
    page.evaluate("document.querySelector('#filter-hand').value = 'keep'")
    page.dispatch_event("#filter-hand", "change")
    assert text_of(page, "shown") == f"1 of {MADE} images"
    page.reload()
    page.wait_for_selector("body.loaded")
    assert text_of(page, "shown") == f"1 of {MADE} images"


def test_what_the_server_refuses_is_taken_back(site: Site) -> None:
    page = site.again()
    refusal = {"status": 500, "body": json.dumps({"error": "the disk is full"})}
    page.route("**/api/overrides", lambda route: route.fulfill(**refusal))
    with page.expect_response("**/api/overrides"):
        page.keyboard.press("d")
    page.wait_for_selector(".said.bad")
    assert "the disk is full" in text_of(page, "said")
    assert page.locator(".cell.by-hand").count() == 0 and site.saved(0) == {}
    page.unroute("**/api/overrides")
    site.errors.clear()
    page.keyboard.press("d")
    site.saved(1)


def test_names_are_text_and_only_what_is_near_is_in_the_document(site: Site) -> None:
    page = site.again()
    assert 0 < page.locator(".cell").count() < MADE
    assert page.locator(".class-name").first.inner_text() == "<b>bag</b>"
    page.fill("#filter-search", "<img")
    assert text_of(page, "shown") == f"{len(LEVELS) * SEEDS * (SOURCES // 3) - 6} of {MADE} images"
    page.focus("#grid")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail-facts dd")
    assert text_of(page, "detail-title") == HOSTILE
    assert page.locator("img[src=x], b").count() == 0
    assert page.locator("#filter-class option").nth(2).inner_text() == HOSTILE
    assert site.errors == []


def test_keyboard_alone_narrow_and_dark(site: Site) -> None:
    page = site.again()
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 400, "height": 800})
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, dark[4:-1].split(","))) < 120
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 400
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "filter-search"
    page.keyboard.type("hat")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "grid"
    ring = "getComputedStyle(document.querySelector('.cursor .frame')).outlineStyle"
    assert page.evaluate(ring) == "solid"
    page.keyboard.press("?")
    page.wait_for_selector("#help[open]")
    page.keyboard.press("Escape")
    described = page.get_attribute("#grid", "aria-activedescendant")
    assert page.get_attribute(f"#{described}", "aria-label").startswith("hat, 0 %, seed 0")
    for name in ("levels", "audit", "comparison"):
        page.click(f'[data-page="{name}"]')
        page.wait_for_selector(f"#page-{name} .command")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 400
    page.emulate_media(color_scheme="light")


def test_pages_show_what_was_measured(site: Site) -> None:
    spread = {"mean": 0.7, "quarter": 0.6, "median": 0.7, "three_quarters": 0.8}
    similarity = {"image_similarity": spread, "text_similarity": spread}
    levels = {
        **{"sources": 2, "seeds": 1, "clip": HOSTILE, "threshold": 0.1},
        "real": {"text_similarity": spread, "pair_similarity": None, "kept": 0.9},
        "levels": [
            {"level": level, "steps": 5, "images": 2, **similarity, "kept": 0.5}
            | {"kept_at_proposal": 0.25}
            for level in LEVELS
        ],
        "proposal": {"levels": [0], "threshold": 0.2, "bound": 0.9, "reasons": [HOSTILE]},
    }
    (site.run / paths.LEVELS).mkdir()
    (site.run / paths.LEVELS / paths.LEVELS_DATA).write_text(json.dumps(levels))
    row = {"figures": {"few": [0.5, 0.7]}, "intervals": {"few": [20.2, 16.7, 23.5]}}
    compared = {"seeds": [0, 1], "split": "test", "baseline": "ce", "notes": [HOSTILE]}
    compared["rows"] = {"ce": {"figures": {"few": [0.3, 0.5]}}, HOSTILE: row}
    (site.run / paths.COMPARISON_DATA).write_text(json.dumps(compared))
    page = site.again()
    page.click('[data-page="levels"]')
    page.wait_for_selector("#page-levels svg >> nth=1")
    assert page.locator("#page-levels tbody tr").nth(1).inner_text().split()[:3] == ["50", "%", "5"]
    assert "threshold: 0.2" in page.inner_text("#page-levels pre")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#page-comparison tbody")
    cells = page.locator("#page-comparison tbody tr").nth(1).inner_text().split()
    assert " ".join(cells) == f"{HOSTILE} 60.0 ± 14.1 +20.2 [+16.7, +23.5]"
    assert page.locator("img[src=x]").count() == 0 and site.errors == []


def test_a_leak_stays_dropped_whatever_is_decided(site: Site) -> None:
    judged = """async (verdicts) => {
      const { judge, settledOf } = await import('/static/table.js');
      const score = Float32Array.of(0.9, 0.9, 0.1, 0.9, 0.9);
      const table = { rows: 5, score, verdict: [1, 3, 2, 4, 4], cell: new Uint32Array(5) };
      const kept = new Uint8Array(5);
      judge(table, Float64Array.of(0.5), [0, 1, 1, 0, 1], settledOf(verdicts), kept);
      return [...kept];
    }"""
    assert site.page.evaluate(judged, list(VERDICTS)) == [1, 0, 1, 0, 1]
    assert [VERDICTS[number] for number in (1, 3, 4)] == [
        "kept",
        "copies a held-out image",
        "dropped by another rule",
    ]


def test_a_move_of_the_slider_over_a_hundred_thousand_images(site: Site) -> None:
    """Judged by the processor time of the page's main thread; others may use the machine."""
    rows, random = 100_000, np.random.default_rng(0)
    columns = {
        "id": np.frombuffer(b"%032d" * rows % (*range(rows),), np.uint8).reshape(rows, 32),
        "class": (np.arange(rows) // 40 % 3).astype(np.uint32),
        "level": np.tile(np.uint8(LEVELS), rows // 2),
        "source": (np.arange(rows) // 40).astype(np.uint32),
        "score": random.normal(0.3, 0.1, rows).astype(np.float32),
        "source_digest": np.full((rows // 40, 32), 48, np.uint8),
    }
    for name, kind in {"seed": "u2", "prompt": "u4", "verdict": "u1", "used": "u4"}.items():
        columns[name] = np.zeros(rows, kind)
    for name, kind in {"hand": "u1", "tag": "u2", "try": "u2"}.items():
        columns[name] = np.zeros(rows, kind)
    head = {"rows": rows, "prompts": [""], "tags": [""], "methods": [], "sources": rows // 40}
    page = site.context.new_page()
    page.route("**/api/columns", lambda route: route.fulfill(body=pack_columns(head, columns)))
    page.route("**/api/stamp", lambda route: route.abort())
    page.goto(site.address)
    page.wait_for_selector("body.loaded .cell")
    client = page.context.new_cdp_session(page)
    client.send("Performance.enable", {"timeDomain": "threadTicks"})
    before = busy_seconds(client)
    for cut in (0.2, 0.25, 0.3, 0.35, 0.4):
        page.evaluate(MOVE, cut)
        kept = (columns["score"] >= cut).sum()
        assert text_of(page, "kept").startswith(f"{kept} of {rows} kept")
    assert (busy_seconds(client) - before) / 5 < 0.1
    assert page.locator(".cell").count() < 500
    page.close()


def test_a_store_that_grows_meanwhile(site: Site) -> None:
    page = site.again()
    page.keyboard.press("d")
    site.saved(1)
    plan = read_plan(site.run / paths.PLAN)
    add_images(site.run, plan, range(MADE, len(plan)), CLASSES)
    page.wait_for_timeout(600)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_selector("#news:not([hidden])")
    assert text_of(page, "news-words") == "12 new images"
    page.click("#news-reload")
    page.wait_for_selector("#news", state="hidden")
    assert text_of(page, "shown") == f"{len(plan)} images"
    assert page.locator(".cell.by-hand.drop").count() == 1
    page.keyboard.press("u")
    assert site.saved(0) == {}
    assert site.errors == []
