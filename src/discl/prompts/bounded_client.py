"""The HTTP client that `openai` sends with: bounded answers, no redirects, no headers but ours.

`openai` has no settings for these. It reads an answer whole, whatever its size, and it sends
headers from environment variables (`OPENAI_ORG_ID`, `OPENAI_CUSTOM_HEADERS`, …) to every server.
"""

from __future__ import annotations

from typing import Any

import openai

MAX_ERROR_BYTES = 10_000
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Hosts that are reached without a proxy."""
SENT = {"host", "content-type", "content-length", "accept", "accept-encoding", "connection"}
KEPT = {"retry-after", "location"}
"""Headers of an answer that are read."""


class BoundedClient(openai.DefaultAsyncHttpxClient):
    """Sends requests without the environment's headers, and reads at most a number of bytes back.

    - `key`: the API key to send, or None.
    - `max_bytes`: an answer has at most one byte more than this, so that the caller sees that it is
      too long. The text of an error is cut at `MAX_ERROR_BYTES`.

    There is no timeout: the caller sets a deadline for the whole request.
    """

    def __init__(self, key: str | None, max_bytes: int) -> None:
        direct = {f"all://{host}": None for host in LOOPBACK}
        super().__init__(timeout=None, follow_redirects=False, mounts=direct)
        self.key, self.max_bytes = key, max_bytes

    async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """The answer, read to its end or to the bound. A cut-off error is still an error."""
        headers = {name: text for name, text in request.headers.items() if name.lower() in SENT}
        headers["User-Agent"] = "discl"
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        sent = type(request)(
            request.method,
            request.url,
            headers=headers,
            stream=request.stream,
            extensions=request.extensions,
        )
        answer = await super().send(sent, stream=True, **options)
        most = self.max_bytes + 1 if answer.is_success else MAX_ERROR_BYTES
        body = bytearray()
        try:
            async for part in answer.aiter_bytes():
                body += part
                if len(body) >= most:
                    break
        except Exception:
            if answer.is_success:
                raise
        finally:
            await answer.aclose()
        return type(answer)(
            answer.status_code,
            headers={name: text for name, text in answer.headers.items() if name.lower() in KEPT},
            content=bytes(body[:most]),
            request=request,
        )
