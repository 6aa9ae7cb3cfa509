"""The routes of `discl browse`, as one Starlette application.

Every answer has a strict Content-Security-Policy (`default-src 'self'`, no inline script or style)
and `X-Content-Type-Options: nosniff`. Requests with another Host than 127.0.0.1 or localhost at the
port of the server get 421. The command prints an address with `?key=…`; it sets a cookie, without
which everything is 403, because other users of a machine reach its ports. JSON is UTF-8, without
NaN (null instead). Errors are `{"error": "what to do"}` with status 400, 403, 404, 409, 413, 415,
421, 422 or 500; texts are plain and may quote names of others, so the page inserts them as text.

Images are identified by their content: a synthetic one by its `id`, a real one by the `digest` of
its pixels (both 32 hexadecimal digits). So addresses of pictures stay true while the run grows.

- `GET /`: `static/index.html`, in which `__TOKEN__` is replaced, for
  `<meta name="token" content="__TOKEN__">`.
- `GET /static/{file}`: `app.js`, `style.css` and other files of `static/`.
- `GET /api/run`: ::

      {
        "name": str, "folder": str, "stamp": str,
        "classes": [str], "class_counts": [int], "groups": {"many": [label], …},
        "levels": [int], "rule": "threshold" | "difficulty" | "alia", "threshold": float,
        "level_thresholds": {level: float}, "class_thresholds": {name: float},
        "methods": [{"name": str, "levels": [int], "threshold": float | null, "scale": float}],
        "verdicts": ["not judged", "kept", "below the threshold", "copies a held-out image",
                     "dropped by another rule", "kept by hand", "dropped by hand"],
        "hand": ["none", "keep", "drop"],
        "counts": {"planned": int, "stored": int, "judged": int, "kept": int, "by_hand": int},
        "hard_counts": [int],
        "pages": {"levels": bool, "audit": bool, "comparison": bool},
        "neighbours": bool, "generating": bool, "notes": [str]
      }

  `hard_counts` are the sources of each class. Kept images over sources is the effective scale.
  `stamp` changes with the store, the verdicts, the overrides and the recipe; poll `GET /api/stamp`,
  which has `stamp`, `rows_stamp` and `overrides_stamp`: where `rows_stamp` is the same, reading
  `/api/overrides` again is enough. All answers with a stamp have the three. A method may draw an
  image of one of its levels that the filter keeps (its own `threshold` in place of the filter's, if
  it has one).
- `GET /api/columns`: `application/octet-stream`, one row for each image, sorted by source, seed,
  try and level. Little-endian: u32 length of the head in bytes, the head (JSON, padded with
  spaces so that the columns begin at a multiple of 8), then the columns, each at a multiple of 8
  bytes after the head. ::

      head: {"stamp": str, "rows": int, "prompts": [str], "tags": [str],
             "methods": [str], "sources": int,
             "columns": [{"name": str, "dtype": "u8"|"u16"|"u32"|"f32", "offset": int,
                          "length": int, "width": int}]}

  `offset` counts from the end of the padded head, `length` elements, `width` elements a row.

  | column | dtype | |
  |---|---|---|
  | id | u8 × 32 | ASCII of the id |
  | class | u32 | index into `classes` of `/api/run` |
  | level | u8 | per cent |
  | seed | u16 | |
  | try | u16 | |
  | prompt | u32 | index into `prompts` |
  | source | u32 | index into the column `source_digest` |
  | score | f32 | clip_similarity, NaN without a score |
  | verdict | u8 | index into `verdicts`: that of the last `discl filter` |
  | hand | u8 | index into `hand`: none, keep, drop (now, in `overrides.csv`) |
  | tag | u16 | index into `tags`; 0 is no tag |
  | used | u32 | bit k: `methods[k]` may draw it as the filter left it; first 32 methods |
  | source_digest | u8 × 32 | not by row: ASCII of the digest of each source |

- `GET /api/row/{id}`: ::

      {"id", "class", "level", "seed", "try", "prompt", "negative_prompt", "score", "verdict",
       "reason", "hand", "tag", "note", "methods": [str], "round": int | null,
       "width", "height", "bytes", "image_digest", "made": {column of the store: value},
       "problem": str | null,
       "source": {"id", "digest", "class", "found": bool},
       "siblings": [{"id", "level", "seed", "try"}]}

  `problem` says why the picture cannot be shown. `siblings` are the other images of its source.
- `GET /api/neighbours/{id}?count=12`: nearest in CLIP space, best first, at most 50 each. ::

      {"real": [{"digest", "id", "class", "split", "similarity"}],
       "synthetic": [{"id", "class", "level", "similarity"}]}  or  {"missing": "what to run"}

- `GET /image/{id}`, `GET /real/{digest}`, both with `?size=thumb` (at most 160 pixels a side):
  the stored bytes, or a WebP where the browser could not show them. `Cache-Control: immutable` and
  an ETag. 404 for an unknown picture, 422 for one that cannot be decoded: `<img>` fires `error`.
- `GET /api/overrides`: `{"stamp": str, "overrides": [{"id", "verdict", "tag", "reason",
  "known": bool}]}` with verdict keep, drop or none.
- `GET /api/pages/levels`: `levels.json` as `discl levels` wrote it.
  `GET /api/pages/audit`: `{"findings": [{"kind", "text", "split", "id", "class", "level", "value",
  "other_split", "other", "digest", "other_digest"}], "counts": {kind: int}, "outdated": bool}`,
  the digests for pictures of real images (`split` is `synthetic` for others).
  `GET /api/pages/comparison`: `comparison.json`, or `{"results": results.json}` without one.
  Each is `{"missing": "command to run"}` where nothing is measured.

Changing requests carry the header `X-Token`, an `Origin` of this server, the content type
`application/json` and at most 1 MiB.

- `POST /api/overrides`: `[{"id": str, "verdict": "keep"|"drop"|"none", "tag": str,
  "reason": str}]`, at most 10,000; the later one of an id wins, and a row with verdict none and
  no tag is removed. Answers `{"stamp": str, "changed": int}`. They count with the next
  `discl filter`.
- `POST /api/threshold`: `{"threshold": float, "level_thresholds": {level: float},
  "class_thresholds": {name: float}, "apply": bool}`. Answers `{"lines": str,
  "command": str}`: the lines of the recipe and the command. With `apply` it does what
  `discl filter --amend` does and answers `{"applied": true, "kept": int, "stamp": str}`; 409 while
  images are missing or another stage runs. Without `threshold` it applies the overrides alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import yaml
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ..errors import DisclError, RunError
from ..run_folder.overrides import NONE, Override, check_text
from ..utils.hashing import digest_bytes
from ..utils.logging import get_logger
from .answers import about_row, about_run
from .guard import Guard, Secrets
from .pages import PAGES, neighbours
from .pictures import Encoded
from .run_view import RunView

logger = get_logger(__name__)

STATIC = files(__package__) / "static"
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".png": "image/png"}
"""Media types of the files in `static/`, by suffix; others are not served."""
FILE = re.compile(r"[a-z0-9_-]+\.[a-z0-9]+")
TOKEN = "__TOKEN__"
MOST_CHANGES = 10_000
MOST_NEIGHBOURS = 50
FOREVER = "private, max-age=31536000, immutable"


def make_app(view: RunView, port: int, secrets: Secrets) -> ASGIApp:
    """The application of a run folder.

    - `view`: the run folder.
    - `port`: the port that Host and Origin of a request have to name.
    - `secrets`: key and token.
    """
    routes = _Routes(view, secrets)
    made = [
        Route("/", routes.page),
        Route("/static/{name}", _static),
        Route("/api/run", _reading(lambda request: about_run(view))),
        Route("/api/stamp", _reading(lambda request: view.stamps())),
        Route("/api/columns", routes.columns),
        Route("/api/row/{name}", _reading(routes.row)),
        Route("/api/neighbours/{name}", _reading(routes.neighbours)),
        Route("/api/overrides", _reading(routes.overrides), methods=["GET"]),
        Route("/api/overrides", routes.change, methods=["POST"]),
        Route("/api/threshold", routes.threshold, methods=["POST"]),
        Route("/api/pages/{name}", _reading(routes.measured)),
        Route("/image/{name}", routes.image),
        Route("/real/{name}", routes.real),
    ]
    answers = Starlette(
        routes=made,
        exception_handlers={HTTPException: _on_http, DisclError: _on_known, Exception: _on_bug},
    )
    return Guard(answers, port, secrets)


class _Routes:
    """The answers that need the view."""

    def __init__(self, view: RunView, secrets: Secrets) -> None:
        self.view, self.secrets = view, secrets

    def page(self, request: Request) -> Response:
        text = (STATIC / "index.html").read_text(encoding="utf-8")
        return Response(text.replace(TOKEN, self.secrets.token), media_type="text/html")

    def columns(self, request: Request) -> Response:
        return Response(self.view.columns(), media_type="application/octet-stream")

    def row(self, request: Request) -> Any:
        return _found(about_row(self.view, request.path_params["name"]), "image")

    def neighbours(self, request: Request) -> Any:
        count = request.query_params.get("count", "12")
        if not (count.isascii() and count.isdecimal() and 0 < int(count) <= MOST_NEIGHBOURS):
            raise HTTPException(400, f"count has to be from 1 to {MOST_NEIGHBOURS}.")
        return neighbours(self.view, request.path_params["name"], int(count))

    def measured(self, request: Request) -> Any:
        page = _found(PAGES.get(request.path_params["name"]), "page")
        return page(self.view)

    def overrides(self, request: Request) -> Any:
        planned = self.view.rows().planned
        listed = [
            {"id": name, **vars(each), "known": name in planned}
            for name, each in self.view.overrides().items()
        ]
        return {**self.view.stamps(), "overrides": listed}

    def image(self, request: Request) -> Response:
        return _picture(request, self.view.picture)

    def real(self, request: Request) -> Response:
        return _picture(request, self.view.real_picture)

    async def change(self, request: Request) -> Response:
        body = await _json(request)
        if not isinstance(body, list) or len(body) > MOST_CHANGES:
            raise HTTPException(422, f"expected a list of at most {MOST_CHANGES} overrides.")
        changes = [_override(each) for each in body]
        stamps = await run_in_threadpool(self.view.change, changes)
        return _answer({**stamps, "changed": len(changes)})

    async def threshold(self, request: Request) -> Response:
        body = await _json(request)
        if not isinstance(body, dict) or not set(body) <= {*THRESHOLDS, "apply"}:
            raise HTTPException(422, f"expected {', '.join(THRESHOLDS)} and apply.")
        changes = _thresholds(body, self.view.tree["filter"])
        if body.get("apply") is not True:
            return _answer(_lines(self.view, changes))
        try:
            await run_in_threadpool(self.view.filter_again, changes)
        except RunError as error:
            return _answer({"error": str(error), **_lines(self.view, changes)}, 409)
        about = await run_in_threadpool(about_run, self.view)
        return _answer({"applied": True, "kept": about["counts"]["kept"], "stamp": about["stamp"]})


THRESHOLDS = ("threshold", "level_thresholds", "class_thresholds")
"""Keys of the section `filter` that a page may change."""


def _thresholds(body: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """`{key of the recipe: value}`; empty mappings only where the recipe has some."""
    changes: dict[str, Any] = {}
    for name in THRESHOLDS:
        value = body.get(name)
        if value is None or (value == {} and not present.get(name)):
            continue
        if name == "threshold":
            changes["filter.threshold"] = _cosine(value)
        elif isinstance(value, dict):
            changes[f"filter.{name}"] = {key: _cosine(each) for key, each in value.items()}
        else:
            raise HTTPException(422, f"{name} has to be a mapping of numbers.")
    return changes


def _cosine(value: Any) -> float:
    if type(value) not in (int, float) or not -1 <= value <= 1:
        raise HTTPException(422, "a threshold has to be a number from -1 to 1.")
    return round(float(value), 6)


def _lines(view: RunView, changes: Mapping[str, Any]) -> dict[str, str]:
    """The lines of the recipe, and the command that does the same."""
    if not changes:
        return {"lines": "", "command": view.command("filter")}
    section = {key.removeprefix("filter."): value for key, value in changes.items()}
    lines = yaml.safe_dump({"filter": section}, sort_keys=False, allow_unicode=True)
    more = [part for key, value in changes.items() for part in ("--set", f"{key}={_flow(value)}")]
    return {"lines": lines, "command": view.command("filter", *more, "--amend")}


def _flow(value: Any) -> str:
    """A value of `--set`; JSON is YAML."""
    return json.dumps(value, ensure_ascii=False)


def _override(body: Any) -> tuple[str, Override]:
    texts = {"verdict": NONE, "tag": "", "reason": ""}
    if not isinstance(body, dict) or not set(body) <= {"id", *texts}:
        raise HTTPException(422, "an override has id, verdict, tag and reason.")
    values = {name: body.get(name, default) for name, default in texts.items()}
    name = body.get("id")
    if not isinstance(name, str) or not name.strip() or name != name.strip():
        raise HTTPException(422, "an override needs the id of an image.")
    if not all(isinstance(value, str) for value in values.values()):
        raise HTTPException(422, "verdict, tag and reason have to be texts.")
    try:
        check_text("id", name)
        return name, Override(**values)
    except DisclError as error:
        raise HTTPException(422, str(error)) from error


def _reading(answer: Callable[[Request], Any]) -> Callable[[Request], Response]:
    """A route that answers JSON; it runs in a thread."""

    def route(request: Request) -> Response:
        return _answer(answer(request))

    return route


def _answer(content: Any, status: int = 200) -> Response:
    return JSONResponse(_plain(content), status)


def _plain(value: Any) -> Any:
    """The value without NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _found(value: Any, what: str) -> Any:
    if value is None:
        raise HTTPException(404, f"there is no such {what}; the run may have changed.")
    return value


def _picture(request: Request, read: Callable[[str, bool], Encoded | None]) -> Response:
    size = request.query_params.get("size")
    if size not in (None, "thumb"):
        raise HTTPException(400, "size has to be thumb.")
    encoded = _found(read(request.path_params["name"], size == "thumb"), "picture")
    tag = f'"{digest_bytes(encoded.data)}"'
    headers = {"Cache-Control": FOREVER, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(encoded.data, media_type=encoded.kind, headers=headers)


def _static(request: Request) -> Response:
    name = request.path_params["name"]
    kind = KINDS.get(name[name.rfind(".") :]) if FILE.fullmatch(name) else None
    if kind is None or not (STATIC / name).is_file():
        raise HTTPException(404, "there is no such file.")
    return Response((STATIC / name).read_bytes(), media_type=kind)


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is no JSON.") from error


async def _on_http(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    return _answer({"error": str(getattr(error, "detail", error))}, status)


async def _on_known(request: Request, error: Exception) -> Response:
    """An error that a user can fix: a picture that cannot be decoded, a broken file."""
    return _answer({"error": str(error)}, 422)


async def _on_bug(request: Request, error: Exception) -> Response:
    """Any other error: its details are for the terminal only."""
    logger.error(f"browse: {request.url.path} failed ({type(error).__name__})")
    return _answer({"error": "this failed; the terminal of `discl browse` says more."}, 500)
