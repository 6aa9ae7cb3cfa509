"""`discl browse`: what its routes answer, while a run grows and when its files are broken."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from discl.audit.findings import Finding
from discl.audit.table import write_findings
from discl.browse.run_view import RunView
from discl.errors import DisclError, RunError
from discl.run_folder import paths
from discl.spectrum.embeddings import embedding_shards
from discl.spectrum.plan import read_plan
from discl.spectrum.store import spectrum_shards
from discl.utils.hashing import digest
from helpers.browsed import HOSTILE, add_images, make_browsed
from helpers.site import Site

CLASSES = (HOSTILE, "bag", "hat")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_browsed(tmp_path_factory.mktemp("browsed"))


@pytest.fixture(scope="module")
def site(whole: Path) -> Site:
    """Of a run that no test changes."""
    return Site(whole)


@pytest.fixture
def own(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change; its data is the other's."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_about_the_run(site: Site) -> None:
    about = site.json("/api/run")
    assert about["classes"] == list(CLASSES) and about["class_counts"] == [2, 2, 2]
    assert about["hard_counts"] == [2, 2, 2] and about["levels"] == [0, 50]
    assert about["threshold"] == 0 and about["rule"] == "threshold"
    assert about["counts"] == {"planned": 24, "stored": 24, "judged": 24, "kept": 12, "by_hand": 0}
    assert about["pages"] == {"levels": False, "audit": False, "comparison": False}
    assert [(each["name"], each["levels"]) for each in about["methods"]] == [
        ("ce", []),
        ("all", [0, 50]),
        ("text", [0]),
    ]
    assert not about["notes"] and not about["neighbours"] and not about["generating"]


def test_columns_are_those_of_plan_and_filter(site: Site, whole: Path) -> None:
    head, columns = site.columns()
    plan = {request.id: request for request in read_plan(whole / paths.PLAN)}
    verdicts = {row["id"]: row for row in pq.read_table(whole / paths.FILTER).to_pylist()}
    assert head["rows"] == 24 and set(columns["id"]) == set(plan)
    assert head["stamp"] == site.json("/api/stamp")["stamp"] == site.json("/api/run")["stamp"]
    for row, name in enumerate(columns["id"]):
        request, verdict = plan[name], verdicts[name]
        assert (columns["class"][row], columns["level"][row]) == (request.label, request.level)
        assert columns["seed"][row] == request.seed and columns["try"][row] == 0
        assert head["prompts"][columns["prompt"][row]] == request.prompt
        assert columns["source_digest"][columns["source"][row]] == request.source_digest
        score = verdict["clip_similarity"]
        assert columns["score"][row] == np.float32(score)
        assert columns["verdict"][row] == (1 if verdict["keep"] else 2)
        drawn = 2 * verdict["keep"] + 4 * (request.level == 0 and score >= 0.5)
        assert columns["used"][row] == drawn
    order = np.lexsort((columns["level"], columns["try"], columns["seed"], columns["source"]))
    assert (order == np.arange(24)).all()


def test_a_row_says_all_that_is_known(site: Site) -> None:
    _, columns = site.columns()
    row = site.json(f"/api/row/{columns['id'][0]}")
    assert row["class"] == HOSTILE and row["prompt"] == f"a photo of {HOSTILE}"
    assert row["verdict"] == "below the threshold" and row["hand"] == "none"
    assert row["score"] == -1 and row["reason"] == "clip_similarity low" and row["methods"] == []
    assert row["made"]["model"] == "m" and row["problem"] is None and row["bytes"] > 100
    assert row["source"]["id"] == "00000.png" and row["source"]["class"] == HOSTILE
    assert [each["id"] for each in row["siblings"]] == columns["id"][1:4].tolist()
    assert site.json("/api/row/none", 404)["error"]


def test_pictures_are_kept_by_the_browser(site: Site) -> None:
    _, columns = site.columns()
    for path in (f"/image/{columns['id'][0]}", f"/real/{columns['source_digest'][0]}"):
        for query in ("", "?size=thumb"):
            answer = site.get(path + query)
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("image/")
            assert "immutable" in answer.headers["cache-control"]
            tag = {"If-None-Match": answer.headers["etag"]}
            assert site.get(path + query, headers=tag).status_code == 304
        assert site.get(path + "?size=huge").status_code == 400
    for path in ("/image/none", "/real/none"):
        assert site.json(path, 404)["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/static/..%2frun_view.py",
        "/static/%2e%2e/app.py",
        "/static/app.py",
        "/static/%00",
        "/image/..%2f..%2frecipe.yaml",
        "/real/..%2frecipe.yaml",
        "/api/pages/..%2frecipe",
        "/recipe.yaml",
        "//etc/passwd",
    ],
)
def test_nothing_else_is_served(site: Site, path: str) -> None:
    answer = site.get(path)
    assert answer.status_code == 404 and set(answer.json()) == {"error"}


def test_overrides_are_written_and_seen_by_two_tabs(own: Path) -> None:
    first, second = Site(own), Site(own)
    _, columns = first.columns()
    name, other = columns["id"][:2]
    before = second.json("/api/stamp")
    change = [{"id": name, "verdict": "drop", "tag": "=1+1", "reason": HOSTILE}]
    answer = first.change("/api/overrides", change)
    assert answer.status_code == 200 and answer.json()["changed"] == 1
    after = second.json("/api/stamp")
    assert after["stamp"] == answer.json()["stamp"] != before["stamp"]
    assert after["rows_stamp"] == before["rows_stamp"]
    second.change("/api/overrides", [{"id": name, "verdict": "keep", "tag": "=1+1"}])
    second.change("/api/overrides", [{"id": other, "verdict": "drop"}])
    head, columns = first.columns()
    assert columns["hand"][:3].tolist() == [1, 2, 0]
    assert head["tags"][columns["tag"][0]] == "=1+1" and columns["tag"][1] == 0
    assert first.json(f"/api/row/{name}")["hand"] == "keep"
    assert "\n=" not in (own / paths.OVERRIDES).read_text().replace(",", "\n")
    gone = [{"id": each, "verdict": "none"} for each in (name, other)]
    first.change("/api/overrides", gone)
    assert second.json("/api/overrides")["overrides"] == []


def test_an_override_of_an_unknown_id_is_noted_and_stays(own: Path) -> None:
    site = Site(own)
    (own / paths.OVERRIDES).write_text("id,verdict\nunknown,drop\n")
    assert "1 override" in site.json("/api/run")["notes"][0]
    _, columns = site.columns()
    site.change("/api/overrides", [{"id": columns["id"][0], "verdict": "keep"}])
    listed = site.json("/api/overrides")["overrides"]
    assert [(each["id"], each["known"]) for each in listed] == [
        ("unknown", False),
        (columns["id"][0], True),
    ]


def test_a_broken_file_of_overrides_is_said_and_never_overwritten(own: Path) -> None:
    site = Site(own)
    (own / paths.OVERRIDES).write_text("id,verdict\na,perhaps\n")
    assert "line 2" in site.json("/api/run")["notes"][0]
    answer = site.change("/api/overrides", [{"id": "b", "verdict": "drop"}])
    assert answer.status_code == 422 and "line 2" in answer.json()["error"]
    assert "perhaps" in (own / paths.OVERRIDES).read_text()


@pytest.mark.parametrize(
    "body",
    [
        {"id": "a"},
        [{"id": 1}],
        [{"id": "a", "verdict": "maybe"}],
        [{"id": "a", "tag": "x" * 61}],
        [{"id": "a", "tag": "\u202e"}],
        [{"id": "a", "verdict": None}],
        [{"id": "a", "more": 1}],
        [{"verdict": "keep"}],
    ],
)
def test_wrong_overrides_are_refused(site: Site, body: Any) -> None:
    assert site.change("/api/overrides", body).status_code == 422
    assert not (site.run / paths.OVERRIDES).exists()


def test_a_store_that_grows_shows_its_new_images(tmp_path: Path) -> None:
    run = make_browsed(tmp_path, stored=range(8))
    (run / paths.FILTER).unlink()
    site = Site(run)
    first = site.json("/api/run")
    assert first["counts"]["stored"] == 8 and first["counts"]["judged"] == 0
    head, columns = site.columns()
    assert head["rows"] == 8 and not columns["verdict"].any()
    assert np.isfinite(columns["score"]).all()  # images are scored while they are made
    add_images(run, read_plan(run / paths.PLAN), range(8, 24), CLASSES)
    _wait_for_news(site, first["stamp"])
    head, columns = site.columns()
    assert head["rows"] == 24 and site.json("/api/run")["counts"]["stored"] == 24
    assert site.get(f"/image/{columns['id'][23]}").status_code == 200


def _wait_for_news(site: Site, stamp: str) -> None:
    for _ in range(100):
        if site.json("/api/stamp")["stamp"] != stamp:
            return
        time.sleep(0.05)
    raise AssertionError("the stamp has not changed")


def test_a_run_without_images(tmp_path: Path) -> None:
    run = make_browsed(tmp_path, stored=[])
    site = Site(run)
    about = site.json("/api/run")
    assert about["counts"]["stored"] == 0 and "discl generate" in about["notes"][0]
    assert site.columns()[0]["rows"] == 0 and about["classes"] == list(CLASSES)
    (run / paths.PLAN).unlink()
    (run / paths.FILTER).unlink()
    assert "no plan" in Site(run).json("/api/run")["notes"][0]
    with pytest.raises(RunError, match=r"no run folder"):
        RunView(tmp_path, lambda value: None)


def test_what_is_broken_is_said_and_the_rest_is_there(own: Path) -> None:
    shards = sorted((own / paths.SPECTRUM).glob("*.parquet"))
    shards[0].write_bytes(b"cut off")
    table = pq.read_table(shards[1])
    rows = table.to_pylist()
    rows[0]["image"]["bytes"] = b"no picture"
    rows[0]["image_digest"] = None
    rows[1]["image"]["bytes"] = rows[2]["image"]["bytes"]  # another one than was written
    shards[1].unlink()
    pq.write_table(table.from_pylist(rows, table.schema), shards[1])
    (own / paths.AUDIT).write_bytes(b"none")
    site = Site(own)
    about = site.json("/api/run")
    assert about["counts"]["stored"] == 16 and shards[0].name in about["notes"][0]
    for row in rows[:2]:
        assert site.json(f"/image/{row['id']}?size=thumb", 422)["error"]
        assert site.json(f"/api/row/{row['id']}")["problem"]
    assert site.get(f"/image/{rows[2]['id']}").status_code == 200
    assert site.json("/api/pages/audit", 422)["error"]


def test_data_that_is_gone_leaves_the_synthetic_images(own: Path) -> None:
    recipe = own / paths.RECIPE
    lines = recipe.read_text().splitlines()
    moved = ["  root: /no/such/folder" if line.startswith("  root:") else line for line in lines]
    recipe.write_text("\n".join(moved))
    site = Site(own)
    _, columns = site.columns()
    assert site.json(f"/real/{columns['source_digest'][0]}", 422)["error"]
    assert any("real images" in note for note in site.json("/api/run")["notes"])
    assert site.get(f"/image/{columns['id'][0]}").status_code == 200


def test_a_store_in_a_bucket(tmp_path: Path) -> None:
    run = make_browsed(tmp_path, store=f"memory://{tmp_path.name}")
    site = Site(run)
    _, columns = site.columns()
    assert len(columns["id"]) == 24 and not (run / paths.SPECTRUM).exists()
    assert site.get(f"/image/{columns['id'][5]}?size=thumb").status_code == 200


def test_ten_thousand_classes(own: Path) -> None:
    names = [HOSTILE, "bag", "hat", *(f"class number {number}" for number in range(3, 10_000))]
    for shard in (own / paths.SPECTRUM).glob("*.parquet"):
        shard.unlink()
    add_images(own, read_plan(own / paths.PLAN), range(24), names)
    about = Site(own).json("/api/run")
    assert len(about["classes"]) == len(about["hard_counts"]) == 10_000
    assert about["classes"][0] == HOSTILE and about["counts"]["stored"] == 24


def test_neighbours_come_from_stored_embeddings(own: Path) -> None:
    site = Site(own)
    _, columns = site.columns()
    ids, real = columns["id"].tolist(), columns["source_digest"].tolist()
    missing = site.json(f"/api/neighbours/{ids[0]}")
    assert "discl audit" in missing["missing"]
    names, angles = [*ids[:4], *real[:2], "elsewhere"], [0, 0.1, 0.5, 3, 0.2, 1, 0.01]
    rows = [
        {"id": name, "clip": "c", "embedding": [float(np.cos(angle)), float(np.sin(angle))]}
        for name, angle in zip(names, angles, strict=True)
    ]
    rows.append({"id": ids[5], "clip": "c", "embedding": [float("nan"), 0.0]})
    embedding_shards(own / paths.PILOT / paths.CACHED_EMBEDDINGS).append(rows)
    found = site.json(f"/api/neighbours/{ids[0]}?count=2")
    assert [each["id"] for each in found["synthetic"]] == ids[1:3]
    assert [each["digest"] for each in found["real"]] == real[:2]
    assert found["real"][0]["similarity"] == pytest.approx(np.cos(0.2), abs=1e-3)
    assert found["real"][0]["class"] == HOSTILE and found["synthetic"][0]["level"] in (0, 50)
    assert "missing" in site.json(f"/api/neighbours/{ids[5]}")
    assert site.get(f"/api/neighbours/{ids[0]}?count=1000").status_code == 400


def test_pages_show_what_was_measured(own: Path) -> None:
    site = Site(own)
    for name, command in (("levels", "levels"), ("audit", "audit"), ("comparison", "compare")):
        assert f"discl {command} " in site.json(f"/api/pages/{name}")["missing"]
    (own / paths.LEVELS).mkdir()
    (own / paths.LEVELS / paths.LEVELS_DATA).write_text('{"levels": [{"level": 0}]}')
    (own / paths.RESULTS).write_text('{"ce": {"test": {"accuracy": NaN}}}')
    assert site.json("/api/pages/levels") == {"levels": [{"level": 0}]}
    assert site.json("/api/pages/comparison") == {"results": {"ce": {"test": {"accuracy": None}}}}
    assert site.json("/api/run")["pages"] == {"levels": True, "audit": False, "comparison": True}


def test_findings_name_pictures_that_can_be_shown(own: Path) -> None:
    site = Site(own)
    _, columns = site.columns()
    made, listed = str(columns["id"][0]), pq.read_table(own / paths.DATA).to_pylist()
    real = listed[1]
    found = [
        Finding("leakage", "synthetic", made, 0, 50, 0.99, "train", real["id"]),
        Finding("dark", "train", real["id"], 1, 100, 0.1),
        Finding("collapsed", "synthetic", "", 2, 0, 0.2),
    ]
    write_findings(own / paths.AUDIT, found, "key of other images")
    page = site.json("/api/pages/audit")
    assert page["outdated"] and page["counts"] == {"leakage": 1, "dark": 1, "collapsed": 1}
    leak, dark, collapsed = page["findings"]
    assert leak["id"] == made and leak["digest"] is None and leak["class"] == HOSTILE
    assert leak["other_digest"] == dark["digest"] == real["digest"]
    assert site.get(f"/real/{dark['digest']}?size=thumb").status_code == 200
    assert collapsed["class"] == "hat" and collapsed["digest"] is None
    stated = pq.read_table(own / paths.DATA).select(["split", "id", "digest"]).to_pydict()
    write_findings(own / paths.AUDIT, found, digest(stated))
    assert not site.json("/api/pages/audit")["outdated"]


def test_a_threshold_as_lines_and_as_a_command(site: Site) -> None:
    answer = site.change("/api/threshold", {"threshold": 0.28}).json()
    assert answer["lines"] == "filter:\n  threshold: 0.28\n"
    assert "--set filter.threshold=0.28 --amend" in answer["command"]
    own = {"threshold": 0.2, "level_thresholds": {"50": -0.5}, "class_thresholds": {HOSTILE: 0.1}}
    answer = site.change("/api/threshold", own).json()
    assert yaml.safe_load(answer["lines"]) == {"filter": own}
    words = shlex.split(answer["command"])
    assert f'filter.class_thresholds={{"{HOSTILE}": 0.1}}' in words
    assert 'filter.level_thresholds={"50": -0.5}' in words
    assert site.change("/api/threshold", {"level_thresholds": [1]}).status_code == 422
    assert site.change("/api/threshold", {"class_thresholds": {"a": 9}}).status_code == 422
    for wrong in ({"threshold": 2}, {"threshold": "0"}, {"threshold": True}, [], {"more": 1}):
        assert site.change("/api/threshold", wrong).status_code == 422


def test_an_error_of_ours_tells_the_client_nothing(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(own)
    monkeypatch.setattr(RunView, "methods", lambda view: 1 / 0)
    answer = site.get("/api/run")
    assert answer.status_code == 500 and "Traceback" not in answer.text
    assert "ZeroDivisionError" not in answer.text and "nosniff" in str(answer.headers)
    assert set(json.loads(answer.text)) == {"error"}


def test_stores_written_for_other_class_numbers(own: Path) -> None:
    """The names are then those of the data, whose numbers the plan has."""
    plan = read_plan(own / paths.PLAN)
    for shard in (own / paths.SPECTRUM).glob("*.parquet"):
        shard.unlink()
    renamed = ("zebra", "yak", "hat")
    store = spectrum_shards(own / paths.SPECTRUM, renamed)
    store.append(
        [
            {"id": each.id, "label": 2 - each.label, "prompt": "", "image": {"bytes": b"x"}}
            for each in plan
        ]
    )
    assert Site(own).json("/api/run")["classes"] == list(CLASSES)


DAMAGED = (paths.RECIPE, paths.DATA, paths.HARD, paths.PLAN, paths.FILTER, paths.OVERRIDES)
PATHS = ("/api/run", "/api/columns", "/api/overrides", "/api/pages/audit", "/api/stamp")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_clear_error_or_a_note(own: Path, name: str) -> None:
    """Cut off, empty, of another kind, a folder, or gone: never an error of ours."""
    site, path = Site(own), own / name
    _, columns = site.columns()
    asked = (*PATHS, f"/api/row/{columns['id'][0]}", f"/image/{columns['id'][0]}")
    asked = (*asked, f"/real/{columns['source_digest'][0]}", f"/api/neighbours/{columns['id'][0]}")
    other = own / (paths.PLAN if name != paths.PLAN else paths.DATA)
    contents = [path.read_bytes()[:50] if path.exists() else b"id", b"", other.read_bytes(), None]
    for content in contents:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        for each in asked:
            answer = site.get(each)
            assert answer.status_code in (200, 404, 422), (content, each, answer.text)
            if answer.status_code != 200:
                assert set(answer.json()) == {"error"}
    path.mkdir()
    assert all(site.get(each).status_code in (200, 404, 422) for each in asked)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("methods", {"a": {"strategy": "os:system"}}),
        ("methods", {"a": {"strategy": "fixed", "level": "x", "threshold": "y"}}),
        ("methods", {"a": {"strategy": "all-levels", "train": {"curriculum_epochs": 10**12}}}),
        ("methods", [1]),
        ("filter", {"threshold": 0.5, "level_thresholds": [1]}),
        ("spectrum", {"levels": [10**9, -5]}),
        ("spectrum", 3),
        ("groups", {}),
        ("runtime", {"store": "reference://x"}),
        ("runtime", {"store": 5}),
        ("name", {"a": 1}),
    ],
)
def test_a_recipe_of_somebody_else_is_data(own: Path, key: str, value: Any) -> None:
    path = own / paths.RECIPE
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**tree, key: value}))
    try:
        site = Site(own)
    except DisclError:
        return
    for each in PATHS:
        answer = site.get(each)
        assert answer.status_code in (200, 422), (each, answer.text)
