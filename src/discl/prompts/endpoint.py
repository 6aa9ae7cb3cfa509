"""A language model behind the chat interface that OpenAI, vLLM, Ollama, llama.cpp and many others share.

Errors name the address, what came back and what to do; the key stands in none of them.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from ..errors import EndpointError, RecipeError

PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
"""Answers after which the same request may succeed."""
LONGEST_ANSWER = 4_000_000
LONGEST_WAIT = 300.0
SHOWN = 300


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Followed blindly, a redirect would carry the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Passing(Exception):
    """A failure after which the request is sent again; `wait` is what the server asked for, in seconds."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


def check_url(url: str) -> str:
    """The base URL without a slash at its end. Raises RecipeError for what is none, or holds a password."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise RecipeError(f"'{url}' is no base URL; it begins with http:// or https:// and often ends in /v1.")
    if parts.username or parts.password or parts.query:
        raise RecipeError("a base URL holds neither a password nor a query; put a key into an environment variable and name that.")
    return url.rstrip("/").removesuffix("/chat/completions")


def read_key(variable: str | None) -> str | None:
    """The API key in an environment variable, None where none is named. Raises EndpointError where it is not set."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EndpointError(f"the environment variable {variable}, which should hold the API key, is not set; export it and go on.")
    return key


@dataclass(frozen=True)
class Endpoint:
    """`POST URL/chat/completions`.

    `parameters` (temperature, max_tokens, …) go into each request as they are. A request that a busy or failing server turns
    away is sent again at most `retries` times, after the seconds that the server names in Retry-After, else after
    `backoff`, 2 · `backoff`, 4 · `backoff` … seconds. `stopped` ends waiting early. `section` is where the recipe states all this.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    section: str = "prompts.endpoint"
    stopped: threading.Event = field(default_factory=threading.Event, repr=False)

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's answer to a conversation. Raises EndpointError once retrying is of no use."""
        body = json.dumps({**self.parameters, "model": self.model, "messages": list(messages)}).encode()
        for attempt in range(self.retries + 1):
            try:
                return self._content(self._send(body))
            except _Passing as failure:
                wait = self.backoff * 2**attempt if failure.wait is None else failure.wait
                if failure.wait is not None and wait > LONGEST_WAIT:
                    raise EndpointError(
                        f"{self._address} {failure} and asks to wait {wait:.0f} s; run the same command again then."
                    ) from failure
                if attempt == self.retries:
                    raise EndpointError(
                        f"{self._address} {failure}, {attempt + 1} times in a row. Is the server running, and is the address right? "
                        "Once it answers, the same command goes on."
                    ) from failure
                if self.stopped.wait(min(wait, LONGEST_WAIT)):
                    raise EndpointError("stopped while waiting for the endpoint.") from failure
        raise EndpointError(f"{self.section}.retries is {self.retries}; 0 or more is allowed.")

    @property
    def _address(self) -> str:
        return f"{self.url}/chat/completions"

    def _send(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "discl"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        handlers: list[Any] = [_NoRedirect]
        if (urlsplit(self.url).hostname or "") in {"localhost", "127.0.0.1", "::1"}:
            handlers.append(urllib.request.ProxyHandler({}))  # what runs on this machine is not reached through a proxy
        request = urllib.request.Request(self._address, body, headers, method="POST")
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=self.timeout) as answer:
                return answer.read(LONGEST_ANSWER)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, error.headers, error.read(10_000)) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(f"cannot be reached ({getattr(error, 'reason', None) or error!r})") from error

    def _refused(self, status: int, headers: Message, body: bytes) -> Exception:
        said = f"answers {status}: {self._shown(body)}"
        if status in PASSING:
            return _Passing(said, _retry_after(headers.get("Retry-After")))
        advice = {
            401: f"Set the variable that {self.section}.key_variable names to a valid API key.",
            403: f"Set the variable that {self.section}.key_variable names to a key that may use this model.",
            404: f"Check {self.section}.url (most end in /v1) and {self.section}.model.",
        }.get(status, f"Check {self.section}: url, model and parameters.")
        if 300 <= status < 400:
            advice = f"It points to {headers.get('Location')}; if that is right, write it into {self.section}.url."
        return EndpointError(f"{self._address} {said}. {advice}")

    def _content(self, body: bytes) -> str:
        """The text in a chat completion, `?` for what is no character in it; empty where the model wrote none."""
        try:
            content = json.loads(body)["choices"][0]["message"].get("content")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise EndpointError(
                f"{self._address} answers no chat completion: {self._shown(body)}. "
                f"Check {self.section}.url: the base URL of an OpenAI-compatible server, most end in /v1."
            ) from error
        return whole_characters(content) if isinstance(content, str) else ""

    def _shown(self, body: bytes) -> str:
        text = " ".join(body.decode(errors="replace").split())
        text = text.replace(self.key, "…") if self.key else text
        return f"'{text[:SHOWN]}…'" if len(text) > SHOWN else f"'{text}'"


def whole_characters(text: str) -> str:
    """The text with `?` for halves of characters (lone surrogates), which JSON can hold and no file."""
    return text.encode(errors="replace").decode()


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which states them or a date (RFC 9110, section 10.2.3); None where it states neither."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
