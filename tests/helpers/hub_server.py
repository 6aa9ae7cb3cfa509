"""A hub of one model on 127.0.0.1, with the part of the API that downloads need."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "a" * 40


@contextmanager
def serve(root: Path, name: str) -> Iterator[tuple[str, list[str]]]:
    """Serves the files of `root` as the model `name`; yields (URL, names of downloaded files)."""
    fetched: list[str] = []
    files = {
        str(file.relative_to(root)): file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path, headers = unquote(self.path.partition("?")[0]), {}
            if path.startswith(f"/api/models/{name}/tree/"):
                listed = [
                    {
                        "type": "file",
                        "path": file,
                        "size": len(data),
                        "oid": hashlib.sha1(data).hexdigest(),
                    }
                    for file, data in files.items()
                ]
                data = json.dumps(listed).encode()
            elif path.startswith(f"/api/models/{name}"):
                siblings = [{"rfilename": file} for file in files]
                data = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
            elif (file := path.partition("/resolve/")[2].partition("/")[2]) in files:
                data = files[file]
                headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                if self.command == "GET":
                    fetched.append(file)
            else:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for key, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
