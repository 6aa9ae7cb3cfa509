"""Who may ask `discl browse` what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from discl.browse.guard import HEADERS, MOST_BYTES
from discl.run_folder import paths
from helpers.browsed import make_browsed
from helpers.site import HOST, PORT, Site

CHANGE: list[dict[str, Any]] = [{"id": "a", "verdict": "drop"}]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(make_browsed(tmp_path_factory.mktemp("guarded"), sources=3))


def test_the_key_of_the_address_opens_the_page(site: Site) -> None:
    stranger = Site(site.run)
    stranger.cookies.clear()
    for path in ("/", "/api/run", "/api/columns", "/static/app.js", "/image/a"):
        answer = stranger.get(path)
        assert answer.status_code == 403 and "discl browse" in answer.json()["error"]
    assert stranger.get("/?key=wrong").status_code == 403
    assert stranger.get("/api/run?key=" + stranger.secrets.key).status_code == 403
    entered = stranger.get("/?key=" + stranger.secrets.key, follow_redirects=False)
    cookie = entered.headers["set-cookie"]
    assert entered.status_code == 303 and "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert stranger.get("/api/run").status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        f"evil.example:{PORT}",
        "127.0.0.1",
        "127.0.0.1:80",
        f"127.0.0.1:{PORT}.x",
        "",
    ],
)
def test_another_host_is_refused(site: Site, host: str) -> None:
    """A name of an attacker may resolve to 127.0.0.1."""
    for path in ("/api/run", f"/?key={site.secrets.key}"):
        assert site.get(path, headers={"Host": host}).status_code == 421


def test_localhost_is_a_name_of_this_machine(site: Site) -> None:
    assert site.get("/api/run", headers={"Host": f"localhost:{PORT}"}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", f"https://127.0.0.1:{PORT}"])
def test_only_the_own_page_changes_something(site: Site, origin: str) -> None:
    for path in ("/api/overrides", "/api/threshold"):
        assert site.change(path, CHANGE, Origin=origin).status_code == 403
    assert not (site.run / paths.OVERRIDES).exists()


def test_a_change_needs_the_token(site: Site) -> None:
    for token in ("", "wrong", site.secrets.token[:-1], site.secrets.key):
        assert site.change("/api/overrides", CHANGE, **{"X-Token": token}).status_code == 403
    assert site.post("/api/overrides", json=CHANGE, headers={"Origin": HOST}).status_code == 403
    assert not (site.run / paths.OVERRIDES).exists()


def test_a_change_is_short_json(site: Site) -> None:
    named = {"Origin": HOST, "X-Token": site.secrets.token}
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {**named, "Content-Type": kind}
        assert site.post("/api/overrides", content="[]", headers=headers).status_code == 415
    headers = {**named, "Content-Type": "application/json"}
    for body, status in (("{", 400), ("[" * 5000, 400), ("[]", 200), (" " * MOST_BYTES, 400)):
        assert site.post("/api/overrides", content=body, headers=headers).status_code == status
    long = iter([b" " * MOST_BYTES, b"  "])  # without a Content-Length
    assert site.post("/api/overrides", content=long, headers=headers).status_code == 413


def test_pages_of_other_sites_get_nothing(site: Site) -> None:
    for where in ("cross-site", "same-site"):
        headers = {"Sec-Fetch-Site": where}
        assert site.get("/api/run", headers=headers).status_code == 403
        assert site.get("/image/a", headers=headers).status_code == 403


def test_every_answer_has_the_headers(site: Site) -> None:
    strange = {"Host": "evil.example"}
    answers = [site.get("/api/run"), site.get("/none"), site.get("/api/run", headers=strange)]
    answers += [site.delete("/api/run"), site.change("/api/run", [])]
    for answer in answers:
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    assert [each.status_code for each in answers] == [200, 404, 421, 403, 405]


def test_other_methods_are_refused(site: Site) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert site.request(method, "/api/overrides").status_code in (403, 405)
    assert site.head("/api/run").status_code == 200


def test_secrets_are_in_no_answer_but_the_page(site: Site, tmp_path: Path) -> None:
    for path in ("/api/run", "/api/columns", "/api/overrides"):
        answer = site.get(path)
        for secret in (site.secrets.key, site.secrets.token):
            assert secret.encode() not in answer.content
