"""The chat interface: broken answers, keys and addresses, retries and their pause."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import math
import sys
import time
import traceback
from pathlib import Path

import pytest

from discl.errors import EndpointError, RecipeError
from discl.prompts.chat_client import ChatClient, ensure_openai
from discl.prompts.class_descriptions import TextRules, write_missing
from helpers.chat_server import (
    Clock,
    Raw,
    Reply,
    Server,
    asked_for,
    completion,
    numbered,
    sentences,
    serve,
)

HELLO = [{"role": "user", "content": "hello"}]
SECRET = "sk-se/cret+7"


def endpoint(server: Server, **settings) -> ChatClient:
    return ChatClient(server.url, "tiny-llm", **{"backoff": 0.01, "retries": 1, **settings})


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    "reply",
    [
        Raw(b"Content-Length: 1000\r\n\r\npart", reset=True),
        Raw(b"Content-Length: 1000\r\n\r\npart"),
        Raw(b"Transfer-Encoding: chunked\r\n\r\n100\r\npart"),
    ],
    ids=["reset", "short", "chunk cut off"],
)
def test_a_busy_answer_that_breaks_off_is_still_one_to_ask_again_after(
    status: int, reply: Raw
) -> None:
    broken = Raw(f"HTTP/1.1 {status} Busy\r\n".encode() + reply.data, reply.reset)
    with serve(lambda before, _: broken if before == 0 else completion("hi")) as server:
        assert endpoint(server).complete(HELLO) == "hi"
    assert len(server.bodies) == 2


def test_a_refusal_that_breaks_off_is_told_as_one() -> None:
    broken = Raw(b"HTTP/1.1 401 No\r\nTransfer-Encoding: chunked\r\n\r\n100\r\npart")
    with (
        serve(lambda *_: broken) as server,
        pytest.raises(EndpointError, match=r"answers 401: 'part'") as raised,
    ):
        endpoint(server).complete(HELLO)
    assert raised.value.argument == "key_variable"
    assert len(server.bodies) == 1


def test_a_redirect_to_nowhere_is_told_as_one() -> None:
    with (
        serve(lambda *_: (308, {"Location": "http://[::1/v1"}, "")) as server,
        pytest.raises(EndpointError, match=r"points to http://\[::1"),
    ):
        endpoint(server).complete(HELLO)


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "reply",
    [
        Raw(OK + b"Content-Length: 1000\r\n\r\n", again=b" ", pause=0.02),
        Raw(OK + b"\r\n", again=b" ", pause=0.02),
        Raw(OK + b"Transfer-Encoding: chunked\r\n\r\n", again=b"1\r\n \r\n", pause=0.02),
        Raw(OK + b"X-Slow: ", again=b"x", pause=0.02),
        Raw(b"", again=b"H", pause=0.02),
        Raw(b"", again=b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.02),
        Raw(b"HTTP/1.1 500 No\r\nContent-Length: 1000\r\n\r\n", again=b" ", pause=0.02),
        Raw(b"HTTP/1.1 100 Continue\r\n\r\n", again=b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=[
        "body",
        "open end",
        "chunks",
        "header",
        "status",
        "continue",
        "failure",
        "continue at once",
    ],
)
def test_a_server_that_drips_is_given_up_in_time(reply: Raw) -> None:
    start = time.monotonic()
    with serve(lambda *_: reply) as server:
        with pytest.raises(EndpointError) as caught:
            endpoint(server, timeout=0.3).complete(HELLO)
        assert time.monotonic() - start < 3
    assert "2 times in a row" in str(caught.value)
    assert "within 0.3 s" in str(caught.value) or "answers 500" in str(caught.value)


def test_an_answer_that_drips_in_time_is_read() -> None:
    said = completion("hi")[2].encode()
    slow = Raw(
        OK + f"Content-Length: {len(said) + 10}\r\n\r\n".encode() + said, again=b"\n", pause=0.01
    )
    with serve(lambda *_: slow) as server:
        assert endpoint(server, timeout=20).complete(HELLO) == "hi"


@pytest.mark.parametrize(
    "reply",
    [
        Raw(OK + b"Content-Length: 10000000000\r\n\r\n", again=b" " * 65_536),
        Raw(OK + b"\r\n", again=b" " * 65_536),
        Raw(
            OK + b"Transfer-Encoding: chunked\r\n\r\n", again=b"10000\r\n" + b" " * 65_536 + b"\r\n"
        ),
    ],
    ids=["length", "open end", "chunks"],
)
def test_an_answer_without_end_is_refused(reply: Raw) -> None:
    with serve(lambda *_: reply) as server:
        with pytest.raises(EndpointError, match=r"more than 4,000,000 bytes"):
            endpoint(server, timeout=20).complete(HELLO)
        assert len(server.bodies) == 1


def test_the_text_of_an_error_is_bounded_as_well() -> None:
    reply = Raw(b"HTTP/1.1 400 No\r\n\r\n", again=b"x" * 65_536)
    with serve(lambda *_: reply) as server:
        with pytest.raises(EndpointError, match="answers 400: 'xxx") as raised:
            endpoint(server, timeout=20).complete(HELLO)
        assert len(server.bodies) == 1
    assert len(str(raised.value)) < 1000


def test_a_compressed_answer_is_bounded_by_what_it_unpacks_to() -> None:
    packed = gzip.compress(b" " * 10_000_000)
    with (
        serve(lambda *_: (200, {"Content-Encoding": "gzip"}, packed)) as server,
        pytest.raises(EndpointError, match=r"more than 4,000,000 bytes"),
    ):
        endpoint(server).complete(HELLO)


@pytest.mark.parametrize("key", [None, SECRET])
def test_nothing_of_the_environment_reaches_the_server(
    monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "of-another-server")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv(
        "OPENAI_CUSTOM_HEADERS", "X-Gateway: of-another-server\nAuthorization: of-another-server"
    )
    with serve(lambda *_: completion("hi")) as server:
        assert endpoint(server, key=key).complete(HELLO) == "hi"
    assert "of-another-server" not in str(server.headers)
    assert server.headers[0].get("Authorization") == (f"Bearer {key}" if key else None)
    assert not [name for name in server.headers[0] if name.lower().startswith("x-")]


def test_a_server_that_repeats_the_key_does_not_bring_it_into_a_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    echo = f"HTTP/1.1 401 Bad {SECRET}\r\nX-Key: {SECRET}\r\n\r\n{SECRET}"
    with (
        caplog.at_level(logging.DEBUG),
        serve(lambda *_: Raw(echo.encode())) as server,
        pytest.raises(EndpointError),
    ):
        endpoint(server, key=SECRET).complete(HELLO)
    assert "401 Bad" in caplog.text and SECRET not in caplog.text
    assert not logging.getLogger("openai").filters


def test_a_proxy_is_used_but_not_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(lambda *_: completion("hi")) as server:
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
        assert ChatClient("http://chat.invalid/v1", "m").complete(HELLO) == "hi"
        assert server.paths == ["http://chat.invalid/v1/chat/completions"]
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with serve(lambda *_: completion("hi")) as server:
        assert endpoint(server).complete(HELLO) == "hi"


def test_a_notebook_may_ask() -> None:
    async def cell() -> str:
        return endpoint(server).complete(HELLO)

    with serve(lambda *_: completion("hi")) as server:
        assert asyncio.run(cell()) == "hi"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_openai()
    monkeypatch.setitem(sys.modules, "openai", None)
    for use in (ensure_openai, lambda: ChatClient("http://127.0.0.1:9/v1", "m").complete(HELLO)):
        with pytest.raises(EndpointError, match=r"pip install 'discl\[openai\]'"):
            use()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("end", ["", "#" + "x" * 20_000])
def test_a_redirect_is_told_and_never_followed(status: int, end: str) -> None:
    with serve(lambda *_: completion("stolen")) as other:
        reply = (status, {"Location": f"{other.url}/{SECRET}{end}"}, "")
        with serve(lambda *_: reply) as server:
            with pytest.raises(
                EndpointError, match=f"answers {status}.*points to {other.url}"
            ) as caught:
                endpoint(server, key=SECRET).complete(HELLO)
            assert len(server.bodies) == 1
        assert other.bodies == []
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 2000


ODD_ANSWERS = [
    "",
    "null",
    "1",
    "[]",
    "{}",
    "hello",
    '{"choices": null}',
    '{"choices": []}',
    '{"choices": {}}',
    '{"choices": [null]}',
    '{"choices": [{}]}',
    '{"choices": [{"message": null}]}',
    '{"choices": [{"message": []}]}',
    '{"choices": [{"message": {"content": 5}}]}',
    '{"choices": [{"message": {"content": {"text": "a"}}}]}',
    '{"choices": [{"message": {"content": ["a"]}}]}',
    '{"choices": [{"message": {"content": [{"type": "text", "text": 5}]}}]}',
    '{"choices": [{"text": "an old completion"}]}',
    '{"error": {"message": "no such model"}}',
    "[" * 100_000,
    "9" * 10_000,
    '{"choices": [' + "1," * 1_000_000 + "1]}",
    "<html>" + "x" * 50_000,
]


@pytest.mark.parametrize("said", ODD_ANSWERS, ids=lambda said: said[:60])
def test_an_answer_of_another_shape_is_told_in_short(said: str) -> None:
    with serve(lambda *_: (200, {}, said)) as server:
        with pytest.raises(EndpointError, match="answers no chat completion") as caught:
            endpoint(server).complete(HELLO)
        assert len(server.bodies) == 1
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": None}, ""),
        ({}, ""),
        ({"content": "a\0b\ud800"}, "a?b?"),
        (
            {
                "content": [
                    {"type": "text", "text": "a"},
                    {"type": "thinking"},
                    {"type": "text", "text": "b"},
                ]
            },
            "ab",
        ),
    ],
)
def test_the_text_of_an_answer(message: dict, content: str) -> None:
    said = json.dumps({"choices": [{"message": message}]})
    with serve(lambda *_: (200, {}, said)) as server:
        assert endpoint(server).complete(HELLO) == content


@pytest.mark.parametrize(
    "echo",
    [
        "HTTP/1.1 401 Bad {key}\r\n\r\nno such key: {key}",
        'HTTP/1.1 400 Bad {key}\r\n\r\n{{"error": "{escaped}"}}',
        "HTTP/1.1 503 Bad {key}\r\n\r\n{key}",
        "HTTP/1.1 302 Found {key}\r\nLocation: http://127.0.0.1:9/{key}\r\n\r\n",
        "HTTP/1.1 302 Found {key}\r\nLocation: http://[::1/{key}\r\n\r\n",
        "HTTP/1.1 200 OK\r\n\r\nyour key is {key}",
        "HTTP/1.1 {key}\r\n\r\n",
        "{key}\r\n\r\n",
    ],
)
def test_a_server_that_repeats_the_key_does_not_bring_it_into_a_traceback(echo: str) -> None:
    reply = Raw(echo.format(key=SECRET, escaped=SECRET.replace("/", "\\/")).encode())
    with serve(lambda *_: reply) as server, pytest.raises(EndpointError) as raised:
        endpoint(server, key=SECRET).complete(HELLO)
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    told = "".join(traceback.format_exception(raised.value)).replace("\\", "")
    assert SECRET not in told


@pytest.mark.parametrize(
    "url",
    [
        "http://.example.com/v1",
        "http://127.0.0.1:9/ü/v1",
        "http://[::1/v1",
        "http://127.0.0.1:9/a b",
    ],
)
def test_a_client_of_no_base_url_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match="is no base URL"):
        ChatClient(url, "m")


@pytest.mark.parametrize(
    ("status", "headers", "waits"),
    [
        (429, {"Retry-After": "20"}, [20]),
        (429, {}, [1]),
        (429, {"Retry-After": "nan"}, [1]),
        (429, {"Retry-After": "inf"}, [1]),
        (429, {"Retry-After": "Mon, 01 Jan 2024 00:00:00 +99999999999999"}, [1]),
        (503, {}, [1]),
        (500, {"Retry-After": "5"}, [5]),
        (500, {}, []),
    ],
)
def test_what_a_crowded_server_tells_one_request_holds_for_the_next(
    status: int, headers: dict[str, str], waits: list[float]
) -> None:
    """A failure of one request alone, such as 500, does not."""
    clock = Clock()
    with serve(
        lambda before, _: (status, headers, "") if before == 0 else completion("hi")
    ) as server:
        asked = endpoint(server, backoff=1.0, retries=0, **clock.settings)
        with pytest.raises(EndpointError, match=f"answers {status}"):
            asked.complete(HELLO)
        assert [asked.complete(HELLO), asked.complete(HELLO)] == ["hi", "hi"]
    assert clock.waits == waits


def test_the_longer_wait_holds() -> None:
    clock = Clock()
    pause = clock.settings["pause"]
    pause.extend(5.0)
    pause.extend(2.0)
    assert (pause.left(), pause.left(1.0), pause.left(9.0)) == (5.0, 5.0, 9.0)
    clock.wait(5.0)
    assert pause.left() == 0


def test_requests_in_parallel_wait_for_one_that_was_turned_away(tmp_path: Path) -> None:
    times: list[float] = []
    heard: list[bool] = []

    def other_heard() -> bool:
        """Whether the refused request knows it by now; waits a limited time."""
        while asked.pause.left() == -math.inf and time.monotonic() < times[0] + 5:
            time.sleep(0.01)
        return asked.pause.left() > -math.inf

    def answer(before: int, body: dict) -> Reply:
        times.append(time.monotonic())
        if before == 0:
            return 429, {"Retry-After": "0.5"}, ""
        if before == 1:
            heard.append(other_heard())
        name, count = asked_for(body)
        return numbered(sentences(name, count))

    with serve(answer) as server:
        asked = endpoint(server)
        names = {name: name for name in ("ant", "bee", "cow", "dog")}
        write_missing(tmp_path / "prompts.yaml", names, asked, TextRules(3, 15), parallel=2)
    assert (heard, len(times)) == ([True], 5)
    assert min(times[2:]) - times[0] >= 0.5


def test_a_pause_ends_when_it_is_stopped() -> None:
    asked = ChatClient("http://127.0.0.1:9/v1", "m")
    asked.pause.extend(time.monotonic() + 60)
    asked.stopped.set()
    with pytest.raises(EndpointError, match="stopped while waiting"):
        asked.complete(HELLO)
