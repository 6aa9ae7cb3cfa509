"""A client of OpenAI's chat interface.

Errors name the address, what came back and what to do; the key stands in none of them.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlsplit

from ..errors import EndpointError, RecipeError, shorten
from .deadline import Deadline, open_within

PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
"""Answers after which the same request may succeed."""
CROWDED = {429, 503}
"""Answers that mean too many requests, so that all of them wait."""
LONGEST_ANSWER = 4_000_000
LONGEST_WAIT = 300.0
SHOWN = 300


class _Passing(Exception):
    """A failure after which the request is sent again; `wait` is what the server asked for, in seconds; `crowded`: it asks all to wait."""

    def __init__(self, what: str, wait: float | None = None, crowded: bool = False) -> None:
        super().__init__(what)
        self.wait = wait
        self.crowded = crowded


class Pause:
    """Until when a server is left alone: what one request is told holds for all of them. Times are those of `clock`, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._until = -math.inf

    def extend(self, until: float) -> None:
        """No request before `until`, or later where that was said before."""
        with self._lock:
            self._until = max(self._until, until)

    def left(self, ready: float = -math.inf) -> float:
        """Seconds until a request may be sent that itself waits until `ready`; 0 or less: now."""
        with self._lock:
            return max(self._until, ready) - self.clock()


def check_url(url: str) -> str:
    """The base URL without a slash at its end. Raises RecipeError for what is none, or holds a password."""
    if set("@?#") & set(url):
        raise RecipeError(
            "a base URL holds neither a password nor a query (no '@', '?' or '#'); put a key into an environment variable and name that."
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RecipeError(f"{shorten(url)} is no base URL: {error}.") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        raise RecipeError(
            f"{shorten(url)} is no base URL; it begins with http:// or https:// and often ends in "
            "/v1."
        )
    if not _is_host(parts.hostname):
        raise RecipeError(
            f"{shorten(url)} is no base URL: {shorten(parts.hostname)} can be no host; a host is "
            "an address, or labels of 1 to 63 letters, digits and "
            "hyphens with dots between them."
        )
    if not (url.isprintable() and " " not in url and parts.path.isascii()):
        raise RecipeError(
            f"{shorten(url)} is no base URL: its path may hold ASCII characters only and no space; "
            "write it as "
            f"{shorten(quote(parts.path, safe='/%', errors='replace'), quoted=False)}."
        )
    return url.rstrip("/").removesuffix("/chat/completions")


def _is_host(name: str) -> bool:
    """Whether it can be looked up: an address, or labels of 1 to 63 letters, digits, hyphens and underscores."""
    try:
        plain = name.encode("idna").decode()
    except UnicodeError:
        return False
    return ":" in plain or all(
        re.fullmatch(r"[A-Za-z0-9_-]{1,63}", label) for label in plain.removesuffix(".").split(".")
    )


_OF_A_KEY = re.compile(r"KEY|TOKEN")
_OF_OTHERS = re.compile(r"^AWS_|SECRET|PASS|PRIVATE|SSH|CREDENTIAL|SESSION")


def read_key(variable: str | None) -> str | None:
    """The API key in an environment variable, None where none is named.

    A recipe names the variable and the server that gets its value, so only variables that are called like keys of a
    service are read: with KEY or TOKEN in the name, none of AWS, no password. Raises EndpointError for another one,
    and where it is not set or holds what no key does: a space, a line break, a character that is not ASCII.
    """
    if variable is None:
        return None
    if not _OF_A_KEY.search(variable.upper()) or _OF_OTHERS.search(variable.upper()):
        raise EndpointError(
            f"key_variable {variable} is not called like an API key, so it is not read and sent; put the key into a "
            "variable with KEY or TOKEN in its name, such as OPENAI_API_KEY."
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EndpointError(
            f"the environment variable {variable}, which should hold the API key, is not set; export it and go on."
        )
    _check_key(key, f"the API key in the environment variable {variable}")
    return key


def _check_key(key: str, what: str) -> None:
    """Raises EndpointError, which says where and not what, for a character that cannot stand in a header."""
    strange = re.search(r"[^!-~]", key)
    if strange:
        raise EndpointError(
            f"{what} cannot be sent: its character {strange.start() + 1} is a space, a line break or no ASCII character (the key itself "
            "is not shown); copy it once more."
        )


@dataclass(frozen=True)
class Endpoint:
    """`POST URL/chat/completions`.

    `parameters` (temperature, max_tokens, …) go into each request as they are. A request that a busy or failing server turns
    away is sent again at most `retries` times, after the seconds that the server names in Retry-After, else after
    `backoff`, 2 · `backoff`, 4 · `backoff` … seconds. Where the server is crowded (429, 503) or names the seconds, `pause` holds up the
    other requests as well. `stopped` ends waiting early. `section` is where the recipe states all this.
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
    pause: Pause = field(default_factory=Pause, repr=False)

    def __post_init__(self) -> None:
        if self.key is not None:
            _check_key(self.key, "the API key")

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's answer to a conversation. Raises EndpointError once retrying is of no use."""
        body = json.dumps(
            {**self.parameters, "model": self.model, "messages": list(messages)}
        ).encode()
        ready = -math.inf
        for attempt in range(self.retries + 1):
            self._wait(ready)
            try:
                return self._content(self._send(body))
            except _Passing as failure:
                wait = (
                    self.backoff * 2 ** min(attempt, 30) if failure.wait is None else failure.wait
                )
                if failure.wait is not None and wait > LONGEST_WAIT:
                    raise EndpointError(
                        f"{self._address} {failure} and asks to wait {wait:.0f} s; run the same command again then."
                    ) from failure
                ready = self.pause.clock() + min(wait, LONGEST_WAIT)
                if failure.crowded:
                    self.pause.extend(ready)
                if attempt == self.retries:
                    raise EndpointError(
                        f"{self._address} {failure}, {attempt + 1} times in a row. Is the server running, and is the address right? "
                        "Once it answers, the same command goes on."
                    ) from failure
        raise EndpointError(f"{self.section}.retries is {self.retries}; 0 or more is allowed.")

    @property
    def _address(self) -> str:
        return f"{self.url}/chat/completions"

    def _wait(self, ready: float) -> None:
        """Waits until `ready`, and for as long as any request is told to. Raises EndpointError once `stopped`."""
        while (left := self.pause.left(ready)) > 0:
            if self.stopped.wait(left):
                raise EndpointError("stopped while waiting for the endpoint.")

    def _send(self, body: bytes) -> bytes:
        """What comes back. Errors hide what caused them, for a server may repeat the key in any of it."""
        late = _Passing(f"has given no whole answer within {self.timeout:g} s")
        with Deadline(self.timeout) as deadline:
            try:
                with self._open(body, deadline) as answer:
                    said = answer.read(LONGEST_ANSWER + 1)
            except urllib.error.HTTPError as error:
                with error:
                    raise self._refused(error.code, error.headers, _said(error)) from None
            except (ValueError, http.client.InvalidURL) as error:
                told = shorten(self._hidden(str(error)), SHOWN, quoted=False)
                raise EndpointError(
                    f"{self._address} cannot be asked ({told}). Check {self.section}.url."
                ) from None
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                # A read that timed out had all that was left of the time; the system's own has a number.
                if deadline.passed or (isinstance(reason, TimeoutError) and reason.errno is None):
                    raise late from None
                told = shorten(self._hidden(repr(reason)), SHOWN, quoted=False)
                raise _Passing(f"cannot be reached ({told})") from None
            if deadline.passed:
                raise late
        if len(said) > LONGEST_ANSWER:
            raise EndpointError(
                f"{self._address} answers with more than {LONGEST_ANSWER:,} bytes, which no text "
                "is. Check "
                f"{self.section}.url, and limit the answer (max_tokens in "
                f"{self.section}.parameters)."
            )
        return said

    def _open(self, body: bytes, deadline: Deadline) -> http.client.HTTPResponse:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": "discl",
        }
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        here = (urlsplit(self.url).hostname or "") in {"localhost", "127.0.0.1", "::1"}
        request = urllib.request.Request(self._address, body, headers, method="POST")
        return open_within(request, deadline, proxies=not here)  # none leads to this machine

    def _refused(self, status: int, headers: Message, body: bytes) -> Exception:
        said = f"answers {status}: {self._shown(body)}"
        if status in PASSING:
            wait = _retry_after(headers.get("Retry-After"))
            return _Passing(said, wait, crowded=wait is not None or status in CROWDED)
        advice = {
            401: f"Set the variable that {self.section}.key_variable names to a valid API key.",
            403: f"Set the variable that {self.section}.key_variable names to a key that may use this model.",
            404: f"Check {self.section}.url (most end in /v1) and {self.section}.model.",
        }.get(status, f"Check {self.section}: url, model and parameters.")
        if 300 <= status < 400:
            there = shorten(self._hidden(str(headers.get("Location"))), SHOWN, quoted=False)
            advice = f"It points to {there}; if that is right, write it into {self.section}.url."
        return EndpointError(f"{self._address} {said}. {advice}")

    def _content(self, body: bytes) -> str:
        """The text in a chat completion, `?` for what is no character in it; empty where the model
        wrote none.

        A list of parts is their texts, one after the other.
        """
        try:
            content = json.loads(body)["choices"][0]["message"].get("content")
            if isinstance(content, list):
                content = "".join(part["text"] for part in content if part["type"] == "text")
            if not isinstance(content, str | None):
                raise TypeError(f"content is a {type(content).__name__}")
        except (
            ValueError,
            KeyError,
            IndexError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise EndpointError(
                f"{self._address} answers no chat completion: {self._shown(body)}. "
                f"Check {self.section}.url: the base URL of an OpenAI-compatible server, most end in /v1."
            ) from error
        return whole_characters(content or "")

    def _shown(self, body: bytes) -> str:
        text = self._hidden(" ".join(body.decode(errors="replace").split()))
        return f"'{text[:SHOWN]}…'" if len(text) > SHOWN else f"'{text}'"

    def _hidden(self, text: str) -> str:
        """The text without the key, as it is or with backslashes as JSON puts them."""
        return re.sub(r"\\?".join(map(re.escape, self.key)), "…", text) if self.key else text


def _said(error: urllib.error.HTTPError) -> bytes:
    """The body of an answer that is an error, empty where it breaks off."""
    try:
        return error.read(10_000)
    except (OSError, http.client.HTTPException):
        return b""


def whole_characters(text: str) -> str:
    """The text with `?` for what JSON can hold and no file: halves of characters (lone surrogates)
    and NUL."""
    return text.encode(errors="replace").decode().replace("\0", "?")


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which states them or a date (RFC 9110, section 10.2.3); None where it states neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError, OSError):
        return None
