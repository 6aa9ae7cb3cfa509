"""A browser of `discl browse`, without a socket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from discl.browse.app import make_app
from discl.browse.guard import Secrets
from discl.browse.run_view import RunView

from .browsed import decode_columns

PORT = 8421
HOST = f"http://127.0.0.1:{PORT}"


class Site(TestClient):
    """A browser that has opened the printed address of a run folder."""

    def __init__(self, run: Path, amend: Callable[[Any], None] = lambda changes: None):
        secrets = Secrets()
        super().__init__(
            make_app(RunView(run, amend), PORT, secrets),
            base_url=HOST,
            raise_server_exceptions=False,
        )
        self.run, self.secrets = run, secrets
        self.cookies.set(f"discl-{PORT}", secrets.key)

    def json(self, path: str, status: int = 200) -> Any:
        answer = self.get(path)
        assert answer.status_code == status, answer.text
        return answer.json()

    def change(self, path: str, body: Any, **headers: str) -> Any:
        named = {"Origin": HOST, "X-Token": self.secrets.token, **headers}
        return self.post(path, json=body, headers=named)

    def columns(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return decode_columns(self.get("/api/columns").content)
