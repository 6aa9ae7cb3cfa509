"""A client of OpenAI's chat interface, over the package `openai`.

`openai` builds and sends the requests. Retries stay here, because a busy server holds up the
parallel requests too, and because waiting ends early when the command stops. Neither errors nor
logs hold the key.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from ..errors import EndpointError, shorten
from .endpoint import check_key, check_url

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses after which the same request may succeed."""
BUSY = {429, 503}
"""Statuses that mean too many requests, so that all of them wait."""
MAX_ANSWER_BYTES = 4_000_000
MAX_WAIT = 300.0
"""Seconds to wait between two tries, at most."""
MAX_SHOWN = 300
HTTP_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")


class _RetryError(Exception):
    """A failure after which the request is sent again.

    - `wait`: seconds that the server asks for, or None.
    - `busy`: whether parallel requests wait, too.
    """

    def __init__(self, what: str, wait: float | None = None, busy: bool = False) -> None:
        super().__init__(what)
        self.wait, self.busy = wait, busy


class Pause:
    """The time until which no request is sent to a server, shared by parallel requests.

    - `clock`: the present time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._until = -math.inf

    def extend(self, until: float) -> None:
        """Sends nothing before `until`, or before the time of an earlier call if that is later."""
        with self._lock:
            self._until = max(self._until, until)

    def left(self, ready: float = -math.inf) -> float:
        """Seconds until a request may be sent that itself waits until `ready`; 0 or less: now."""
        with self._lock:
            return max(self._until, ready) - self.clock()


def ensure_openai() -> None:
    """Raises EndpointError where the package `openai` is not installed."""
    if importlib.util.find_spec("openai") is None:
        raise EndpointError(
            "a language model needs the package openai; install it with "
            "pip install 'discl[openai]'."
        )


@dataclass(frozen=True)
class ChatClient:
    """Sends conversations to `URL/chat/completions`.

    - `url`: base URL of a server with OpenAI's chat interface, such as http://localhost:11434/v1.
    - `model`: name of the language model.
    - `key`: API key, or None. No error and no log shows it.
    - `parameters`: sent along as they are, such as `{"temperature": 1.0, "max_tokens": 2000}`.
    - `timeout`: seconds until the whole answer of a request has come.
    - `retries`: how often a request is sent again after a busy or failing server.
    - `backoff`: seconds before the first retry, doubled each time. The header Retry-After goes
      first.
    - `stopped`: ends waiting early.
    - `pause`: shared by parallel requests. A busy server (429, 503) or one that names the seconds
      to wait holds up all of them.

    Raises RecipeError for a URL that is none, EndpointError for a key that cannot be sent.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    _: KW_ONLY
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    stopped: threading.Event = field(default_factory=threading.Event, repr=False)
    pause: Pause = field(default_factory=Pause, repr=False)

    def __post_init__(self) -> None:
        check_url(self.url)
        if self.key is not None:
            check_key(self.key, "the API key")

    def complete(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's answer to a conversation.

        - `messages`: such as `[{"role": "user", "content": "Write a sentence."}]`.

        Raises EndpointError where the server refuses, answers nonsense, or still fails after
        `retries` retries.
        """
        ensure_openai()
        ready = -math.inf
        for attempt in range(self.retries + 1):
            self._wait(ready)
            try:
                return self._text(self._send(messages))
            except _RetryError as failure:
                wait = (
                    self.backoff * 2 ** min(attempt, 30) if failure.wait is None else failure.wait
                )
                if failure.wait is not None and wait > MAX_WAIT:
                    raise EndpointError(
                        f"{self._address} {failure} and asks to wait {wait:.0f} s; "
                        "run the same command again then."
                    ) from failure
                ready = self.pause.clock() + min(wait, MAX_WAIT)
                if failure.busy:
                    self.pause.extend(ready)
                if attempt == self.retries:
                    raise EndpointError(
                        f"{self._address} {failure}, {attempt + 1} times in a row. Is the server "
                        "running, and is the address right? Once it answers, the same command "
                        "continues.",
                        argument="url",
                    ) from failure
        raise EndpointError(f"got {self.retries}; 0 or more is allowed.", argument="retries")

    @property
    def _address(self) -> str:
        return f"{self.url}/chat/completions"

    def _wait(self, ready: float) -> None:
        """Waits until `ready`, and for the pause. Raises EndpointError once `stopped`."""
        while (left := self.pause.left(ready)) > 0:
            if self.stopped.wait(left):
                raise EndpointError("stopped while waiting for the server.")

    def _send(self, messages: Sequence[Mapping[str, str]]) -> bytes:
        """The body of the answer. Errors hide their cause, in which a server may repeat the key."""
        import openai

        try:
            with self._masked_logs():
                said = _run(self._post(messages))
        except TimeoutError:
            raise _RetryError(f"has given no whole answer within {self.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._refused(error.response) from None
        except openai.APIConnectionError as error:
            cause: BaseException = error
            while (deeper := cause.__cause__ or cause.__context__) is not None:
                cause = deeper
            reason = shorten(self._masked(repr(cause)), MAX_SHOWN, quoted=False)
            raise _RetryError(f"cannot be reached ({reason})") from None
        if len(said) > MAX_ANSWER_BYTES:
            raise EndpointError(
                f"{self._address} answers with more than {MAX_ANSWER_BYTES:,} bytes. Check the "
                "URL, and limit the answer with max_tokens in parameters.",
                argument="url",
            )
        return said

    async def _post(self, messages: Sequence[Mapping[str, str]]) -> bytes:
        """Asynchronous, because only then a deadline ends a request at any point."""
        import openai

        from .bounded_client import BoundedClient

        async with BoundedClient(self.key, MAX_ANSWER_BYTES) as http:
            client = openai.AsyncOpenAI(
                api_key=self.key or "none", base_url=self.url, max_retries=0, http_client=http
            )
            chat = client.chat.completions.with_raw_response
            async with asyncio.timeout(self.timeout):
                answer = await chat.create(
                    model=self.model,
                    messages=list(messages),  # type: ignore[arg-type]
                    extra_body=dict(self.parameters),
                    timeout=None,
                )
            return answer.content

    def _refused(self, answer: Any) -> Exception:
        """What to raise for an answer with a status of 300 or more."""
        status = answer.status_code
        what = f"answers {status}: {self._shown(answer.content)}"
        if status in RETRIED:
            wait = _retry_after(answer.headers.get("Retry-After"))
            return _RetryError(what, wait, busy=wait is not None or status in BUSY)
        argument, advice = {
            401: ("key_variable", "Name a variable that holds a valid API key."),
            403: ("key_variable", "Name a variable whose API key may use this model."),
            404: ("url", "Check the URL (most end in /v1) and the model."),
        }.get(status, ("url", "Check url, model and parameters."))
        if 300 <= status < 400:
            there = self._masked(str(answer.headers.get("Location")))
            advice = (
                f"It points to {shorten(there, MAX_SHOWN, quoted=False)}; name that if it is right."
            )
        return EndpointError(f"{self._address} {what}. {advice}", argument=argument)

    def _text(self, body: bytes) -> str:
        """The text of a chat completion, empty where the model wrote none.

        The texts of a list of parts are joined. `?` replaces what is no character.
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
                f"{self._address} answers no chat completion: {self._shown(body)}. Name the base "
                "URL of a server with OpenAI's chat interface; most end in /v1.",
                argument="url",
            ) from error
        return whole_characters(content or "")

    def _shown(self, body: bytes) -> str:
        text = self._masked(" ".join(body.decode(errors="replace").split()))
        return f"'{text[:MAX_SHOWN]}…'" if len(text) > MAX_SHOWN else f"'{text}'"

    def _masked(self, text: str) -> str:
        """The text without the key, as it is or with backslashes as JSON writes them."""
        return re.sub(r"\\?".join(map(re.escape, self.key)), "…", text) if self.key else text

    @contextmanager
    def _masked_logs(self) -> Iterator[None]:
        """Masks the key in the logs of the HTTP libraries, where a server may repeat it."""

        def mask(record: logging.LogRecord) -> bool:
            record.msg, record.args = self._masked(record.getMessage()), None
            return True

        loggers = [
            logging.getLogger(name)
            for name in list(logging.root.manager.loggerDict)
            if name.partition(".")[0] in HTTP_LOGGERS
        ]
        for logger in loggers:
            logger.addFilter(mask)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(mask)


def _run(work: Coroutine[Any, Any, bytes]) -> bytes:
    """The result of asynchronous work, also where a loop runs in this thread, as in notebooks."""
    loop = None
    with suppress(RuntimeError):
        loop = asyncio.get_running_loop()
    if loop is None:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def whole_characters(text: str) -> str:
    """The text with `?` for NUL and for halves of characters, which no file can hold."""
    return text.encode(errors="replace").decode().replace("\0", "?")


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, section 10.2.3), which may hold a date.

    None where it holds neither.
    """
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
