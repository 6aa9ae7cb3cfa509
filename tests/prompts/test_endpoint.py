"""Base URLs and API keys of chat servers."""

from __future__ import annotations

import traceback

import pytest

from discl.errors import EndpointError, RecipeError
from discl.prompts.chat_client import ChatClient
from discl.prompts.endpoint import check_url, read_key


def test_a_base_url_is_tidied() -> None:
    assert (
        check_url("http://host:1/v1/")
        == check_url("http://host:1/v1/chat/completions")
        == "http://host:1/v1"
    )


def test_a_key_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISCL_TEST_KEY", raising=False)
    with pytest.raises(
        EndpointError,
        match="the environment variable DISCL_TEST_KEY, which should hold the API key, is not set",
    ):
        read_key("DISCL_TEST_KEY")
    monkeypatch.setenv("DISCL_TEST_KEY", " abc\n")
    assert read_key("DISCL_TEST_KEY") == "abc"
    assert read_key(None) is None


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("sk-secret\nline2", 10),
        ("sk-secret\r", 10),
        ("sk secret", 3),
        ("sk-secret…", 10),
        ("ключ", 1),
        ("sk-\x7f", 4),
    ],
)
def test_a_key_that_no_header_can_hold_is_refused_unseen(
    monkeypatch: pytest.MonkeyPatch, key: str, place: int
) -> None:
    monkeypatch.setenv("DISCL_TEST_KEY", f"{key}x")
    for use in (
        lambda: read_key("DISCL_TEST_KEY"),
        lambda: ChatClient("http://127.0.0.1:9/v1", "m", f"{key}x"),
    ):
        with pytest.raises(
            EndpointError,
            match=rf"its character {place} is a space, a line break or no ASCII character",
        ) as raised:
            use()
        told = "".join(traceback.format_exception(raised.value))
        assert not any(part in told for part in (key, "secret", "ключ"))
    with pytest.raises(
        EndpointError, match="the API key in the environment variable DISCL_TEST_KEY cannot be sent"
    ):
        read_key("DISCL_TEST_KEY")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            "http://.example.com/v1",
            r"'\.example\.com' can be no host; a host is an address, or labels of 1 to 63",
        ),
        ("http://a..example.com/v1", r"can be no host"),
        (f"http://{'a' * 64}.com/v1", r"can be no host"),
        (f"http://{'ü' * 64}.com/v1", r"can be no host"),
        ("http://two words/v1", r"can be no host"),
        (
            "http://h/ü/v1",
            r"its path may hold ASCII characters only and no space; write it as /%C3%BC/v1\.",
        ),
        ("http://h/a b/v1", r"write it as /a%20b/v1\."),
        ("http://h/v1\n", r"its path may hold"),
        ("http://h/\ud800", r"its path may hold"),
        ("http://[::1/v1", r"is no base URL: Invalid IPv6 URL"),
        ("http://h:abc/v1", r"is no base URL: Port could not be cast to integer value as 'abc'"),
        ("http://h:99999/v1", r"is no base URL: Port out of range"),
        ("http://h:0/v1", r"is no base URL; it begins with"),
        ("localhost:8000/v1", r"is no base URL; it begins with"),
        ("ftp://host/v1", r"is no base URL; it begins with"),
        ("http://", r"is no base URL; it begins with"),
    ],
)
def test_an_address_that_cannot_be_asked_is_refused(url: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:sec/ret@host/v1",
        "http://me:secret@[::1/v1",
        "http://me:secret@/v1",
        "http://host/v1#secret",
        "http://host/v1?key=secret",
    ],
)
def test_a_password_in_an_address_is_refused_unseen(url: str) -> None:
    with pytest.raises(
        RecipeError, match="a base URL holds neither a password nor a query"
    ) as raised:
        check_url(url)
    assert "sec" not in "".join(traceback.format_exception(raised.value)).replace("section", "")


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1]:8000/v1",
        "http://192.168.0.7:11434/v1",
        "https://bücher.example/v1",
        "http://ollama_server:1/v1",
        "http://host./v1",
        "http://h/%C3%BC/v1",
        f"http://{'a' * 63}.com",
    ],
)
def test_an_address_that_can_be_asked_is_taken_as_it_is(url: str) -> None:
    assert check_url(url) == url
