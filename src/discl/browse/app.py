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
- `GET /api/run`: see `about_run`. ::

      {
        "name": str, "folder": str, "stamp": str,
        "classes": [str], "class_counts": [int], "groups": {"many": [label], …},
        "levels": [int], "rule": "threshold" | "alia", "threshold": float,
        "methods": [{"name": str, "synthetic": bool, "levels": [int], "threshold": float | null,
                     "scale": float}],
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
  which is `{"stamp": str, "rows": str, "overrides": str}`: where only `overrides` changes, reading
  `/api/overrides` again is enough. A method may draw an image of one of its levels that the filter
  keeps (its own `threshold` in place of the filter's, if it has one).
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
  | try | u8 | |
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
       "source": {"id", "digest", "class", "width", "height", "found": bool},
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
- `POST /api/threshold`: `{"threshold": float, "apply": bool}`. Answers `{"lines": str,
  "command": str}`: the lines of the recipe and the command. With `apply` it does what
  `discl filter --amend` does and answers `{"applied": true, "kept": int, "stamp": str}`; 409 while
  images are missing or another stage runs. Without `threshold` it applies the overrides alone.
"""
