"""Descriptions by a language model: a real server on 127.0.0.1 answers well, badly or never."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest
import yaml

from discl.errors import EndpointError, RecipeError
from discl.prompts.chat_client import ChatClient
from discl.prompts.class_descriptions import (
    TextRules,
    describe_class,
    find_problem,
    missing_classes,
    parse_texts,
    write_missing,
)
from helpers.chat_server import (
    Clock,
    Reply,
    Server,
    asked_for,
    completion,
    numbered,
    sentences,
    serve,
)

FEW = TextRules(count=3, words=15, tries=3)


def good(_: int, body: dict) -> Reply:
    name, count = asked_for(body)
    return numbered(sentences(name, count))


def endpoint(server: Server, **settings) -> ChatClient:
    return ChatClient(server.url, "tiny-llm", **{"backoff": 0.01, "retries": 3, **settings})


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def test_classes_are_written_one_by_one_as_asked(tmp_path: Path) -> None:
    path, done = tmp_path / "prompts.yaml", []
    with serve(good) as server:
        asked = endpoint(server, key="secret-key", parameters={"temperature": 0.7})
        write_missing(path, {"ursus": "brown bear", "7": "seven"}, asked, FEW, advance=done.append)
    assert yaml.safe_load(path.read_text()) == {
        "ursus": sentences("brown bear", 3),
        "7": sentences("seven", 3),
    }
    assert done == [1, 1]
    assert server.paths == ["/v1/chat/completions"] * 2
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret-key"}
    first = server.bodies[0]
    assert (first["model"], first["temperature"]) == ("tiny-llm", 0.7)
    request = first["messages"][0]["content"]
    assert 'Write 3 descriptions of photographs of "brown bear"' in request
    assert "at least 15 words" in request
    assert "no other kind of subject" in request
    assert "secret-key" not in path.read_text() + repr(asked)


def test_only_needed_classes_are_asked_for_and_no_other_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text("robin, American robin: [a robin]\n")

    def answer(before: int, body: dict) -> Reply:
        if before == 0:  # names "dog", a class that needs no texts itself
            return numbered([f"{text} beside a dog" for text in sentences("cat", 3)])
        return good(before, body)

    with serve(answer) as server:
        names = same("cat", "dog", "American robin")
        write_missing(path, names, endpoint(server), FEW, needed={"cat", "American robin"})
    assert server.classes == ["cat", "cat"]
    assert yaml.safe_load(path.read_text())["cat"] == sentences("cat", 3)


def test_a_server_without_a_key_gets_none(tmp_path: Path) -> None:
    with serve(good) as server:
        write_missing(tmp_path / "prompts.yaml", same("cat"), endpoint(server), FEW)
    assert "Authorization" not in server.headers[0]


A, B = sentences("cat", 2)


@pytest.mark.parametrize(
    "answer",
    [
        f"1. {A}\n2. {B}",
        f"Here are your sentences:\n\n1) {A}\n\n2) {B}\n",
        f"- {A}\n* {B}",
        f'"{A}"\n"{B}"',
        json.dumps([A, B]),
        f"```json\n{json.dumps({'descriptions': [A, B]})}\n```",
        f"<think>\n1. no\n2. no\n</think>\n1. **{A}**\n2. {B}",
        f"1. {A.replace(' light', chr(10) + '   light')}\n2. {B}\n\nI hope these help!",
    ],
    ids=[
        "numbered",
        "with a preface",
        "bullets",
        "lines",
        "json",
        "fenced object",
        "thinking aloud",
        "wrapped",
    ],
)
def test_texts_are_found_in_many_forms_of_answer(answer: str) -> None:
    assert [text for text in parse_texts(answer) if find_problem(text, "cat", (), 15) is None] == [
        A,
        B,
    ]


LONG = "stands in the evening light beside an old wall of grey stone with dry grass around"


@pytest.mark.parametrize(
    ("text", "name", "others", "problem"),
    [
        (f"A cat {LONG}", "cat", ["dog"], None),
        ("A cat sits.", "cat", [], "has 3 words, 15 are needed"),
        (f"A caterpillar {LONG}", "cat", [], "does not name 'cat'"),
        (f"Two Cats and a moth {LONG}", "cat", ["dog"], None),
        (f"A cat with two dogs {LONG}", "cat", ["dog"], "names another class, 'dog'"),
        (f"A red T-shirt {LONG}", "T-shirt/top", ["Shirt", "Coat"], None),
        (f"Berries on a branch: one berry {LONG}", "berry", [], None),
        (f"Several butterflies {LONG}", "butterfly", [], None),
        (f"A snake, quite alone, {LONG}", "snake", ["sea_snake"], None),
        (f"A sea snake {LONG}", "sea_snake", ["snake"], None),
        (f"A tench {LONG}", "tench, Tinca tinca", ["goldfish"], None),
        (f"An ANKLE BOOT {LONG}", "Ankle_boot", ["Sandal"], None),
        (f"Ein Bär {LONG}", "Bär", ["Katze"], None),
    ],
)
def test_what_is_wrong_with_a_text_is_told(
    text: str, name: str, others: list[str], problem: str | None
) -> None:
    assert find_problem(text, name, others, 15) == problem


def test_what_is_usable_is_kept_and_only_the_rest_asked_for_again(tmp_path: Path) -> None:
    def answer(before: int, body: dict) -> Reply:
        name, count = asked_for(body)
        return (
            numbered([sentences(name, 1)[0], "A cat."])
            if before == 0
            else numbered(sentences(name, count, start=5))
        )

    path = tmp_path / "prompts.yaml"
    with serve(answer) as server:
        write_missing(path, same("cat"), endpoint(server), FEW)
        texts = describe_class("dog", (), endpoint(server), FEW)
    assert yaml.safe_load(path.read_text())["cat"] == [
        *sentences("cat", 1),
        *sentences("cat", 2, start=5),
    ]
    assert texts == sentences("dog", 3, start=5)
    assert asked_for(server.bodies[1]) == ("cat", 2)
    complaint = server.bodies[1]["messages"][-1]["content"]
    assert "'A cat.' has 2 words, 15 are needed" in complaint
    assert [message["role"] for message in server.bodies[1]["messages"]] == [
        "user",
        "assistant",
        "user",
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "I am sorry, but I cannot help with that.",
            r"cat: 0 of 3 after 3 tries; 'I am sorry, .*' has 9 words, 15 are needed",
        ),
        ("", r"cat: 0 of 3 after 3 tries; the answer was empty"),
        (None, r"cat: 0 of 3 after 3 tries; the answer was empty"),
        ("1. A cat.\n2. The cat.\n3. Cat!", r"'A cat\.' has 2 words, 15 are needed"),
        (f"1. {sentences('cat', 1)[0]}", r"cat: 1 of 3 after 3 tries; the same ones came again"),
    ],
    ids=["refusal", "empty", "null", "too short", "repeats itself"],
)
def test_a_model_that_writes_nonsense_is_asked_a_bounded_number_of_times(
    tmp_path: Path, content: str | None, told: str
) -> None:
    path = tmp_path / "prompts.yaml"

    def answer(_: int, body: dict) -> Reply:
        return completion(content) if "cat" in asked_for(body)[0] else good(0, body)

    with serve(answer) as server, pytest.raises(EndpointError, match=told) as raised:
        write_missing(path, same("dog", "cat", "owl"), endpoint(server), FEW)
    assert server.classes.count("cat") == 3
    assert missing_classes(path, same("dog", "cat", "owl")) == ["cat"]
    assert str(path) in str(raised.value)


def test_a_model_without_sense_is_not_asked_about_every_class(tmp_path: Path) -> None:
    names = same(*(f"class{number}" for number in range(20)))
    with (
        serve(lambda *_: completion("No.")) as server,
        pytest.raises(EndpointError, match="for 3 classes"),
    ):
        write_missing(tmp_path / "prompts.yaml", names, endpoint(server), FEW)
    assert len(server.bodies) <= 4 * FEW.tries


@pytest.mark.parametrize(
    ("status", "headers", "least"),
    [
        (429, {"Retry-After": "0.3"}, 0.3),
        (503, {}, 0.01),
        (500, {}, 0.01),
        (429, {"Retry-After": "soon"}, 0.01),
    ],
)
def test_a_busy_server_is_asked_again_when_it_says(
    tmp_path: Path, status: int, headers: dict[str, str], least: float
) -> None:
    with serve(
        lambda before, body: (status, headers, "busy") if before == 0 else good(before, body)
    ) as server:
        started = time.monotonic()
        write_missing(tmp_path / "prompts.yaml", same("cat"), endpoint(server), FEW)
    assert len(server.bodies) == 2
    assert time.monotonic() - started >= least


def test_a_date_may_say_when_to_come_back_and_a_far_one_ends_it() -> None:
    later = formatdate(time.time() + 4000, usegmt=True)
    with (
        serve(lambda *_: (429, {"Retry-After": later}, "quota used up")) as server,
        pytest.raises(
            EndpointError,
            match=r"answers 429: 'quota used up' and asks to wait (39\d\d|4000) s",
        ),
    ):
        endpoint(server).complete(
            [{"role": "user", "content": 'Write 1 descriptions of photographs of "cat"'}]
        )
    assert len(server.bodies) == 1


def test_a_server_that_fails_for_ever_is_given_up_and_finished_classes_stay(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    told = r"/v1/chat/completions answers 500: '<html>Internal error</html>', 4 times in a row"

    def answer(before: int, body: dict) -> Reply:
        return good(before, body) if before < 2 else (500, {}, "<html>Internal error</html>")

    with serve(answer) as server, pytest.raises(EndpointError, match=told) as raised:
        write_missing(path, same("ant", "bee", "cat", "dog"), endpoint(server), FEW)
    assert server.url in str(raised.value)
    assert missing_classes(path, same("ant", "bee", "cat", "dog")) == ["cat", "dog"]
    assert len(server.bodies) <= 2 + 4 + 4


def test_waits_double() -> None:
    clock = Clock()
    with (
        serve(lambda *_: (503, {}, "")) as server,
        pytest.raises(EndpointError, match="6 times in a row"),
    ):
        endpoint(server, backoff=1.0, retries=5, **clock.settings).complete(
            [{"role": "user", "content": "hello"}]
        )
    assert clock.waits == [1, 2, 4, 8, 16]


def test_a_server_that_is_down_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    with pytest.raises(
        EndpointError,
        match=rf"{url}/chat/completions cannot be reached .*Refused.*, 2 times in a row",
    ):
        ChatClient(url, "m", backoff=0.01, retries=1).complete(
            [{"role": "user", "content": "hello"}]
        )


def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=r"no whole answer within 0\.2 s"):
            ChatClient(url, "m", timeout=0.2, backoff=0.01, retries=1).complete(
                [{"role": "user", "content": "hello"}]
            )


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (
            (200, {}, "<html>Welcome to nginx!</html>"),
            r"answers no chat completion: '<html>Welcome to nginx!</html>'",
        ),
        (
            (200, {}, '{"error": "model is loading"}'),
            r"answers no chat completion: .*model is loading",
        ),
        ((200, {}, b"\xff\xfe\x00"), "answers no chat completion"),
        ((200, {}, "[" * 100_000), "answers no chat completion"),
        (
            (401, {}, "bad key secret-key"),
            r"key_variable: .* answers 401: 'bad key …'",
        ),
        (
            (404, {}, "no model"),
            r"url: .* answers 404: 'no model'",
        ),
        (
            (400, {}, "max_tokens unknown"),
            r"url: .* answers 400: 'max_tokens unknown'",
        ),
        (
            (302, {"Location": "http://127.0.0.1:9/elsewhere"}, ""),
            r"points to http://127\.0\.0\.1:9/elsewhere",
        ),
    ],
)
def test_an_answer_that_is_none_ends_it_at_once_without_the_key(reply: Reply, told: str) -> None:
    with serve(lambda *_: reply) as server, pytest.raises(EndpointError, match=told) as raised:
        endpoint(server, key="secret-key").complete([{"role": "user", "content": "hello"}])
    assert len(server.bodies) == 1
    assert "secret-key" not in str(raised.value)


def test_halves_of_characters_and_deep_nests_are_only_bad_texts(tmp_path: Path) -> None:
    """In the answer itself, and in JSON that the model wrote into it."""
    texts = [f"{text} \ud800" for text in sentences("boot", 3)]
    for number, content in enumerate(("\n".join(texts), json.dumps(texts))):
        with serve(lambda *_, content=content: completion(content)) as server:
            write_missing(path := tmp_path / f"{number}.yaml", same("boot"), endpoint(server), FEW)
        assert yaml.safe_load(path.read_text(encoding="utf-8")) == {
            "boot": [f"{text} ?" for text in sentences("boot", 3)]
        }
    assert parse_texts("[" * 100_000) == ["[" * 100_000]


def test_edits_and_comments_stay_and_only_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    mine = "# my own words\ncat:  # just one\n- A cat as I know it.\n"
    path.write_text(mine)
    with serve(good) as server:
        write_missing(path, same("cat", "dog"), endpoint(server), FEW)
        write_missing(path, same("cat", "dog"), endpoint(server), FEW)
    assert path.read_text().startswith(mine)
    assert yaml.safe_load(path.read_text()) == {
        "cat": ["A cat as I know it."],
        "dog": sentences("dog", 3),
    }
    assert server.classes == ["dog"]


@pytest.mark.parametrize(
    "text",
    [
        "{cat: [A cat as I know it.], dog: []}\n",
        "cat:\n- A cat as I know it.\ndog:\n",
        "",
        "# nothing yet\n",
    ],
)
def test_a_file_in_any_style_is_completed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with serve(good) as server:
        write_missing(path, same("cat", "dog", "no"), endpoint(server), FEW)
    assert set(yaml.safe_load(path.read_text())) == {"cat", "dog", "no"}
    assert ("cat" in server.classes) == ("cat" not in text)


def test_a_file_that_is_no_list_of_texts_is_refused_before_anything_is_asked(
    tmp_path: Path,
) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text("cat: one text\n")
    with (
        serve(good) as server,
        pytest.raises(RecipeError, match="holds no mapping from class names to lists"),
    ):
        write_missing(path, same("cat"), endpoint(server), FEW)
    assert server.bodies == []


SCRIPT = """
import sys
from pathlib import Path
from discl.prompts.chat_client import ChatClient
from discl.prompts.class_descriptions import TextRules, write_missing
client, rules = ChatClient(sys.argv[1], "m"), TextRules(3, 15, False)
write_missing(Path(sys.argv[2]), {name: name for name in "abcdef"}, client, rules)
"""


def test_killed_half_way_it_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    path, child = tmp_path / "prompts.yaml", []

    def answer(before: int, body: dict) -> Reply:
        if before == 3:
            os.kill(child[0].pid, signal.SIGKILL)
        return good(before, body)

    with serve(answer) as server:
        child.append(subprocess.Popen([sys.executable, "-c", SCRIPT, server.url, str(path)]))
        assert child[0].wait(60) == -signal.SIGKILL
        kept = list(yaml.safe_load(path.read_text()) or [])
        # those before may be on their way into the file while the fourth is asked for
        assert kept == ["a", "b", "c"][: len(kept)]
        write_missing(path, same(*"abcdef"), endpoint(server), TextRules(3, 15, False))
    assert list(yaml.safe_load(path.read_text())) == list("abcdef")
    assert server.classes == ["a", "b", "c", "d", *[name for name in "abcdef" if name not in kept]]
    assert [file.name for file in tmp_path.glob("[!.]*")] == ["prompts.yaml"]


def test_several_requests_at_once_write_the_same_texts(tmp_path: Path) -> None:
    names = same("ant", "bee", "cow", "dog", "eel", "fox")
    with serve(good) as server:
        write_missing(tmp_path / "one.yaml", names, endpoint(server), FEW, parallel=1)
        write_missing(tmp_path / "four.yaml", names, endpoint(server), FEW, parallel=4)
    assert yaml.safe_load((tmp_path / "one.yaml").read_text()) == yaml.safe_load(
        (tmp_path / "four.yaml").read_text()
    )
