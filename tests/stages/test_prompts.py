"""Texts of a run by models: they enter the plan's ids, so a change makes new images."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from discl import cli
from discl.errors import CheckpointError, EndpointError, RecipeError
from discl.pipeline import run_until
from discl.prompts.captions import Captioner
from discl.recipe import load_recipe
from discl.run_folder.open import open_run
from discl.run_folder.run import Run
from discl.stages import prompts as prompting
from helpers import chat_server as stub
from helpers.captioners import save_blip

SMALL = {
    "spectrum.levels": [0, 50],
    "spectrum.seeds": 2,
    "data.long_tail.n_max": 20,
    "data.long_tail.imbalance_ratio": 10,
    "hard.fewer_than": 4,
    "data.splits": {"test": None},  # a few images instead of 10,000
}


def good(_: int, body: dict) -> stub.Reply:
    name, count = stub.asked_for(body)
    return stub.numbered(stub.sentences(name, count))


def opened(folder: Path, url: str, **endpoint: object) -> Run:
    asked = {"url": url, "model": "tiny", "count": 3, "only_class": False, **endpoint}
    return open_run(load_recipe("fashion-lt", {**SMALL, "prompts": {"endpoint": asked}}), folder)


def planned(run: Run) -> dict[str, str]:
    """`{id: prompt}`."""
    return {row["id"]: row["prompt"] for row in pq.read_table(run.path("plan.parquet")).to_pylist()}


@pytest.mark.slow
def test_what_a_model_writes_is_planned_with_and_an_edit_changes_only_its_class(
    tmp_path: Path,
) -> None:
    with stub.serve(good) as server:
        run = opened(tmp_path / "run", server.url)
        assert run_until(run, "prompts") == tmp_path / "run/prompts.yaml"
        assert sorted(server.classes) == ["Coat", "Pullover", "Shirt"]  # the hard ones of ten
        run_until(run, "plan")
        assert len(server.bodies) == 3
    before = planned(run)
    texts = yaml.safe_load(run.path("prompts.yaml").read_text())
    assert set(before.values()) <= {text for each in texts.values() for text in each}
    texts["Shirt"] = ["A shirt of my own."]
    run.path("prompts.yaml").write_text(yaml.safe_dump(texts))
    run_until(run, "plan")  # the server is gone: nothing is asked
    after = planned(run)
    gone, new = before.keys() - after.keys(), after.keys() - before.keys()
    assert {before[name] for name in gone} <= set(stub.sentences("Shirt", 3))
    assert {after[name] for name in new} == {"A shirt of my own."}
    assert gone and len(gone) == len(new) < len(before)


@pytest.mark.slow
def test_a_prefix_stands_before_every_text(tmp_path: Path) -> None:
    few = {**SMALL, "prompts.prefix": "a photo: "}
    planned_texts = {}
    for prompts in ({"prompts.phrases": "embedded:fashion-mnist"}, {"prompts.phrases": None}):
        run = open_run(
            load_recipe("fashion-lt", {**few, **prompts}), tmp_path / str(len(planned_texts))
        )
        run_until(run, "plan")
        planned_texts[len(planned_texts)] = set(planned(run).values())
    assert planned_texts[1] == {
        f"a photo: a photo of {name}" for name in ("Coat", "Pullover", "Shirt")
    }
    assert all(text.startswith("a photo: ") for text in planned_texts[0])
    assert len(planned_texts[0]) > 3


@pytest.mark.slow
def test_a_model_that_is_down_stops_the_run_with_what_was_made_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "http://127.0.0.1:9/v1"
    overrides = [
        *(f"{key}={json.dumps(value)}" for key, value in SMALL.items()),
        f"prompts.endpoint={{url: '{url}', model: m, retries: 0}}",
        "prompts.phrases=null",
    ]
    words = [
        "discl",
        "prompts",
        "fashion-lt",
        "--out",
        str(tmp_path / "run"),
        *(word for each in overrides for word in ("--set", each)),
    ]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert (
        f"error: prompts.endpoint.url: {url}/chat/completions cannot be reached" in said
        and "Traceback" not in said
    )
    assert (tmp_path / "run/hard.parquet").exists()


def test_a_missing_package_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    run = opened(tmp_path / "run", "http://127.0.0.1:9/v1")
    with pytest.raises(EndpointError, match=r"discl\[openai\]"):
        run_until(run, "generate")
    assert not run.path("data.parquet").exists()


def test_a_key_that_is_needed_is_missed_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISCL_TEST_KEY", raising=False)
    run = opened(tmp_path / "run", "http://127.0.0.1:9/v1", key_variable="DISCL_TEST_KEY")
    with pytest.raises(EndpointError, match="DISCL_TEST_KEY"):
        run_until(run, "generate")
    assert not run.path("data.parquet").exists()


@pytest.mark.slow
def test_a_key_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISCL_TEST_KEY", "hush-hush")
    with stub.serve(good) as server:
        run_until(opened(tmp_path / "run", server.url, key_variable="DISCL_TEST_KEY"), "plan")
    assert server.headers[0]["Authorization"] == "Bearer hush-hush"
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or b"hush-hush" not in file.read_bytes()


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (
            {"endpoint": {"url": "http://h/v1", "model": "m"}, "phrases": "embedded:fashion-mnist"},
            r"prompts\.phrases and prompts\.endpoint",
        ),
        (
            {"endpoint": {"url": "host", "model": "m"}},
            "prompts.endpoint.url: 'host' is no base URL",
        ),
        (
            {"endpoint": {"url": "http://h/v1", "model": "m", "key": "sk-1"}},
            "unknown key in prompts.endpoint 'key'; known: .*key_variable",
        ),
        (
            {"endpoint": {"url": "http://h/v1", "model": "m", "parameters": {"stream": True}}},
            "parameters cannot set stream",
        ),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(prompts: dict, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe("fashion-lt", {"prompts": prompts})


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip(tmp_path_factory.mktemp("captioner") / "blip")


def captioned(folder: Path, captioner: Path, amend: bool = False, **captions: object) -> Run:
    prompts = {
        "templates": ["a {class}, {caption}", "{caption}: one {class}"],
        "captions": {"checkpoint": str(captioner), **captions},
    }
    return open_run(load_recipe("fashion-lt", {**SMALL, "prompts": prompts}), folder, amend)


def caption_rows(run: Run) -> list[dict]:
    return [
        row
        for shard in sorted(run.path("captions").glob("part-*.parquet"))
        for row in pq.read_table(shard).to_pylist()
    ]


@pytest.mark.slow
def test_captions_are_made_once_for_each_hard_image_and_shared_by_its_levels(
    tmp_path: Path, captioner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = captioned(tmp_path / "run", captioner, max_new_tokens=4)
    assert run_until(run, "prompts") == tmp_path / "run/captions"
    run_until(run, "plan")
    captions = {row["image"]: row["caption"] for row in caption_rows(run)}
    hard = pq.read_table(run.path("hard.parquet")).to_pylist()
    assert {row["digest"] for row in hard} == set(captions)
    plan = pq.read_table(run.path("plan.parquet")).to_pylist()
    names = run.train.class_names
    for row in plan:
        caption, name = captions[row["source_digest"]], names[row["label"]]
        assert row["prompt"] in {f"a {name}, {caption}", f"{caption}: one {name}"}
    spectra = {(row["source_id"], row["seed"]): set() for row in plan}
    for row in plan:
        spectra[row["source_id"], row["seed"]].add(row["prompt"])
    assert {len(prompts) for prompts in spectra.values()} == {1}

    again = captioned(tmp_path / "run", captioner, amend=True, max_new_tokens=5)
    run_until(again, "plan")
    assert len(caption_rows(again)) == 2 * len(captions)
    assert not set(planned(again)) & {row["id"] for row in plan}
    monkeypatch.setattr(
        prompting, "Captioner", lambda *_: pytest.fail("nothing was to be captioned")
    )
    back = captioned(tmp_path / "run", captioner, amend=True, max_new_tokens=4)
    run_until(back, "plan")
    assert set(planned(back)) == {row["id"] for row in plan}


@pytest.mark.slow
def test_captioning_goes_on_where_it_stopped(
    tmp_path: Path, captioner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompting, "CAPTIONED_AT_ONCE", 3)
    whole = captioned(tmp_path / "whole", captioner, max_new_tokens=4)
    run_until(whole, "prompts")
    seen: list[int] = []

    class Stops(Captioner):
        def __call__(self, images):
            if len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(len(images))
            return super().__call__(images)

    run = captioned(tmp_path / "run", captioner, max_new_tokens=4)
    monkeypatch.setattr(prompting, "Captioner", Stops)
    with pytest.raises(KeyboardInterrupt):
        run_until(run, "prompts")
    assert len(caption_rows(run)) == 6
    monkeypatch.setattr(prompting, "Captioner", Captioner)
    run_until(run, "prompts")
    assert sorted(map(str, caption_rows(run))) == sorted(map(str, caption_rows(whole)))


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (
            {"templates": ["{class}, {caption}"]},
            "no model writes captions; name one in prompts.captions.checkpoint",
        ),
        (
            {"captions": {"checkpoint": "a/b"}},
            r"prompts\.captions needs templates with \{caption\}",
        ),
        (
            {
                "templates": ["{class} {caption}"],
                "captions": {"checkpoint": "a/b"},
                "phrases": "embedded:fashion-mnist",
            },
            "remove phrases",
        ),
        ({"templates": ["{caption}"], "captions": {"checkpoint": "a/b"}}, r"lacks \{class\}"),
    ],
)
def test_captions_and_templates_go_together(prompts: dict, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe("fashion-lt", {"prompts": prompts})


def test_only_what_is_generated_from_may_hold_a_caption() -> None:
    with pytest.raises(RecipeError, match=r"only prompts\.templates may"):
        load_recipe("fashion-lt", {"filter.template": "{class} {caption}"})


def test_a_captioner_that_is_none_stops_before_any_work(tmp_path: Path, tiny_clip: Path) -> None:
    run = captioned(tmp_path / "run", tiny_clip)
    with pytest.raises(CheckpointError, match="writes no captions"):
        run_until(run, "generate")
    assert not run.path("data.parquet").exists()


PLACES = ["in a meadow at dusk", "on a wooden floor", "under a bright lamp", "in fog"]


def bullets(*texts: str) -> Callable[[int, dict], stub.Reply]:
    return lambda *_: stub.completion("\n".join(f"- {text}" for text in texts))


Opens = Callable[..., Run]


@pytest.fixture
def with_settings(small_tree: dict, captioner: Path, tmp_path: Path) -> Opens:
    """Opens a run over ten pictures of boots and hats whose settings are asked of a server."""

    def opens(
        url: str,
        folder: str = "run",
        amend: bool = False,
        templates: list[str] | None = None,
        **more: object,
    ) -> Run:
        asked = {
            "kind": "clothes",
            "images": 6,
            "captions": 3,
            "captioner": {"checkpoint": str(captioner), "max_new_tokens": 4},
            "endpoint": {"url": url, "model": "tiny", "retries": 0},
            **more,
        }
        prompts = (
            {"settings": asked}
            if templates is None
            else {"settings": asked, "templates": templates}
        )
        return open_run(load_recipe({**small_tree, "prompts": prompts}), tmp_path / folder, amend)

    return opens


def test_captions_are_condensed_into_settings_that_the_plan_holds(
    with_settings: Opens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stub.serve(bullets("In a meadow at dusk.", *PLACES[1:], "in fog")) as server:
        run = with_settings(server.url)
        assert run_until(run, "prompts") == tmp_path / "run/settings.yaml"
        (body,) = server.bodies
        request = body["messages"][0]["content"]
    captions = {row["caption"] for row in caption_rows(run)}
    shown = re.findall("^- (.*)$", request, re.MULTILINE)
    assert len(caption_rows(run)) == 6 and 0 < len(shown) <= 3 and set(shown) <= captions
    assert "photos of clothes" in request and "at most 10 settings" in request
    assert yaml.safe_load(run.path("settings.yaml").read_text()) == PLACES

    monkeypatch.setattr(
        prompting, "Captioner", lambda *_: pytest.fail("nothing was to be captioned")
    )
    run_until(run, "plan")  # the server is gone: nothing is asked
    names = run.train.class_names
    plan = pq.read_table(run.path("plan.parquet")).to_pylist()
    assert {row["prompt"].partition(f"{names[row['label']]} ")[2] for row in plan} == set(PLACES)
    assert all(row["prompt"].startswith(f"a photo of a {names[row['label']]} ") for row in plan)

    before = planned(run)
    run.path("settings.yaml").write_text(yaml.safe_dump([*PLACES[:3], "in deep snow"]))
    run_until(run, "plan")
    after = planned(run)
    gone, new = before.keys() - after.keys(), after.keys() - before.keys()
    assert gone and len(gone) == len(new) < len(before)
    assert all(before[name].endswith(" in fog") for name in gone) and all(
        after[name].endswith(" in deep snow") for name in new
    )


def test_settings_go_where_the_templates_say(with_settings: Opens) -> None:
    run = with_settings("http://127.0.0.1:9/v1", templates=["{setting}: one {class}", "a {class}"])
    run.path("settings.yaml").write_text(
        "- at night\n- at noon\n"
    )  # written by hand: neither a captioner nor a server is needed
    run_until(run, "plan")
    assert not run.path("captions").exists()
    names = run.train.class_names
    asked = {
        row["prompt"].replace(names[row["label"]], "X")
        for row in pq.read_table(run.path("plan.parquet")).to_pylist()
    }
    assert asked == {"at night: one X", "at noon: one X", "a X"}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("", "0 of 2 after 2 tries; the answer was empty"),
        (
            "I am sorry, but I cannot help with that.",
            r"0 of 2 after 2 tries; 'I am sorry, but I cannot help with that\.' is a sentence",
        ),
        (
            "- on a hat\n- next to two Boots",
            "'on a hat' names 'hat'; 'next to two Boots' names 'boot'",
        ),
        (
            "- among other clothes\n- in {a} box",
            "'among other clothes' names 'clothes'; 'in {a} box' holds a brace",
        ),
        (
            "- in fog\n- " + "very " * 15 + "dark",
            "1 of 2 after 2 tries; .* has 16 words, at most 15 are allowed",
        ),
        ("in fog", "1 of 2 after 2 tries; the same ones came again"),
    ],
    ids=["empty", "refusal", "classes", "kind and brace", "too long", "only one"],
)
def test_settings_that_make_no_sense_are_refused_and_the_captions_kept(
    with_settings: Opens, monkeypatch: pytest.MonkeyPatch, answer: str, told: str
) -> None:
    with stub.serve(lambda *_: stub.completion(answer)) as server:
        run = with_settings(server.url, tries=2)
        with pytest.raises(EndpointError, match=told) as raised:
            run_until(run, "prompts")
        assert len(server.bodies) == 2
    assert (
        str(run.path("settings.yaml")) in str(raised.value)
        and not run.path("settings.yaml").exists()
    )
    monkeypatch.setattr(
        prompting, "Captioner", lambda *_: pytest.fail("nothing was to be captioned")
    )
    with stub.serve(bullets(*PLACES)) as server:
        run_until(with_settings(server.url, amend=True), "prompts")
    assert yaml.safe_load(run.path("settings.yaml").read_text()) == PLACES


@pytest.mark.parametrize(
    "text", ["", "[]", "in fog", "hat: [in fog]", "- in fog\n-\n", "- at night: dark", "- 'in fog"]
)
def test_a_settings_file_that_is_no_list_is_refused(with_settings: Opens, text: str) -> None:
    run = with_settings("http://127.0.0.1:9/v1")
    run.path("settings.yaml").write_text(text)
    with pytest.raises(
        RecipeError,
        match=r"settings\.yaml (holds no list of settings|is not valid YAML)",
    ):
        run_until(run, "plan")


def test_a_server_of_settings_that_refuses_names_its_own_key(
    with_settings: Opens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stub.serve(lambda *_: (404, {}, "no such model")) as server:
        run = with_settings(server.url)
        with pytest.raises(
            EndpointError,
            match=r"prompts\.settings\.endpoint\.url: .* answers 404: 'no such model'",
        ):
            run_until(run, "prompts")
    monkeypatch.delenv("DISCL_TEST_KEY", raising=False)
    endpoint = {"url": "http://127.0.0.1:9/v1", "model": "tiny", "key_variable": "DISCL_TEST_KEY"}
    with pytest.raises(EndpointError, match="DISCL_TEST_KEY"):
        run_until(with_settings("", "other", endpoint=endpoint), "generate")
    assert not (tmp_path / "other/data.parquet").exists()


MADE = {"captioner": {"checkpoint": "a/b"}, "endpoint": {"url": "http://h/v1", "model": "m"}}


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (
            {"templates": ["a {class} {setting}"]},
            r"hold \{setting\}, but no model writes settings; name a captioner and an endpoint",
        ),
        (
            {"settings": MADE, "templates": ["a {class}"]},
            r"write 'a photo of a \{class\} \{setting\}' there",
        ),
        (
            {"settings": MADE, "phrases": "embedded:fashion-mnist"},
            r"prompts\.settings and prompts\.phrases",
        ),
        (
            {"settings": MADE, "endpoint": MADE["endpoint"]},
            r"prompts\.settings and prompts\.endpoint",
        ),
        (
            {"settings": MADE, "captions": {"checkpoint": "a/b"}},
            r"prompts\.settings and prompts\.captions",
        ),
        (
            {"settings": {**MADE, "captions": 200}},
            r"captions = 200 exceeds prompts\.settings\.images = 100",
        ),
        (
            {"settings": {"endpoint": MADE["endpoint"]}},
            r"prompts\.settings\.captioner: this key is required",
        ),
        (
            {"settings": {**MADE, "count": 1}},
            r"prompts\.settings\.count: input should be greater than or equal to 2",
        ),
        (
            {"settings": {**MADE, "endpoint": {**MADE["endpoint"], "words": 3}}},
            r"unknown key in prompts\.settings\.endpoint 'words'",
        ),
    ],
)
def test_settings_and_templates_go_together(prompts: dict, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe("fashion-lt", {"prompts": prompts})


def test_a_recipe_with_settings_survives_yaml(tmp_path: Path) -> None:
    recipe = load_recipe("fashion-lt", {"prompts": {"settings": MADE}})
    assert recipe.prompts.templates == ["a photo of a {class} {setting}"]
    (tmp_path / "kept.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "kept.yaml") == recipe
