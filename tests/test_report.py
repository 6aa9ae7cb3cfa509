"""The report of small run folders, written here from plain values without models or stages."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from discl.checkpoints import weights_digest
from discl.data import class_groups
from discl.data.table import make_table
from discl.errors import RunError
from discl.escaping import for_markdown
from discl.export import make_card
from discl.recipe import Adapt, load_recipe
from discl.report import charts, gallery, run_summary, tables, write_comparison, write_report
from discl.report import page as page_module
from discl.report import text as words
from discl.report.pilot_section import read_adaptation
from discl.spectrum.models import Generator
from discl.stages.export import describe_export
from discl.stages.provenance import describe_making

EVIL = '<script>alert(1)</script> & "co"'
TWELVE = {
    f"m{index}": ("real-only", "specific-to-diverse", "all-levels")[index % 3]
    for index in range(12)
}
PLAIN = {"ce": "real-only", "discl": "diverse-to-specific"}
TWO_SPECTRAL = {"discl": "diverse-to-specific", "all": "all-levels"}
GENERATOR = Generator("Stable Diffusion 1.x/2.x", "0123abcd", "cdef", 512, 8, distilled=False)
FLUX = dataclasses.replace(
    GENERATOR, family="FLUX.1", distilled=True, sampler="Euler steps of the flow"
)


class Page(HTMLParser):
    """What a page holds: its text, its tags and their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.text = html, [], ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, *attributes: str) -> list[str]:
        return [
            value or ""
            for _, attrs in self.tags
            for name, value in attrs.items()
            if name in attributes
        ]

    def having(self, css_class: str) -> list[dict[str, Any]]:
        return [attrs for _, attrs in self.tags if css_class in (attrs.get("class") or "").split()]


def encode(pixels: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def picture(label: int, level: int, seed: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """A disc of the class's colour that dissolves into noise as λ falls."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    inside = np.hypot((x - width / 2) / width, (y - height / 2) / height) < 0.35
    clean = np.where(
        inside[..., None],
        np.asarray([60 + 37 * label % 190, 230 - 53 * label % 200, 90 + 71 * label % 160]),
        245,
    )
    noise = np.random.default_rng([label, seed]).integers(0, 256, (height, width, 3))
    return (level / 100 * clean + (1 - level / 100) * noise).astype(np.uint8)


def figures(
    names: Sequence[str], counts: Sequence[int], images: int, lift: float
) -> dict[str, Any]:
    """Plausible figures: classes with more training images fare better, `lift` helps the others."""
    share = np.asarray(counts) / max(counts)
    accuracy = np.clip(0.25 + 0.7 * share**0.4 + lift * (1 - 1.3 * share), 0, 1)
    result = {
        "images": images * len(names),
        "accuracy": float(accuracy.mean()),
        "macro_f1": float(accuracy.mean()) - 0.01,
    }
    for group, labels in class_groups(list(counts), 100, 20).items():
        result[group] = float(accuracy[labels].mean())
    result |= {"worst_1": float(accuracy.min()), "calibration_error": 0.1 - lift}
    return {**result, "per_class": dict(zip(names, accuracy.tolist(), strict=True))}


def history(
    strategy: str,
    levels: Sequence[int],
    epochs: int,
    curriculum_epochs: int,
    offset: float,
    validated: bool,
) -> list[dict[str, Any]]:
    stages = sorted(levels)
    records = []
    for epoch in range(epochs):
        used = (
            []
            if strategy == "real-only" or epoch >= curriculum_epochs
            else [stages[epoch * len(stages) // curriculum_epochs]]
        )
        if used and strategy == "all-levels":
            used = stages
        loss = 0.3 + offset + 1.5 * math.exp(-epoch / 6)
        record = {
            "epoch": epoch,
            "levels": used,
            "loss": loss,
            "synthetic_share": 0.25 * bool(used),
            "seconds": 2.5,
        }
        if validated and (epoch + 1) % 5 == 0:
            record["validation_accuracy"] = 0.6 + offset - 0.3 * math.exp(-epoch / 6)
        records.append(record)
    return records


def make_run(
    folder: Path,
    counts: Mapping[str, int],
    methods: Mapping[str, str] = PLAIN,
    levels: Sequence[int] = (0, 30, 50),
    seeds: int = 2,
    splits: Sequence[str] = ("validation", "test"),
    size: tuple[int, int] = (16, 16),
    epochs: int = 20,
    threshold: float = 0.25,
    domains: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a finished run folder with `counts` training images per class; returns its report.

    `changes` are laid over the recipe, such as `{"filter.rule": "alia"}`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names, amounts = list(counts), list(counts.values())
    real = {label: encode(picture(label, 100, 0, size)) for label in range(len(names))}
    labels = [label for label, count in enumerate(amounts) for _ in range(count)]
    ids = [f"train-{row:05d}" for row in range(len(labels))]
    train = make_table(
        {"id": ids, "image": [real[label] for label in labels], "label": labels}, names
    )
    rows = [("train", label) for label in labels] + [
        (split, label) for split in splits for label in range(len(names)) for _ in range(50)
    ]
    pq.write_table(
        pa.table({"split": [split for split, _ in rows], "label": [label for _, label in rows]}),
        folder / "data.parquet",
    )
    rarest = sorted(range(len(names)), key=lambda label: amounts[label])[
        : max(1, min(len(names) - 1, 40))
    ]
    hard = [
        {"id": name, "label": label}
        for name, label in zip(ids, labels, strict=True)
        if label in rarest
    ]
    pq.write_table(pa.Table.from_pylist(hard), folder / "hard.parquet")
    _write_spectrum(folder, names, hard, levels, seeds, size, threshold)
    recipe = load_recipe(
        _recipe(folder, methods, levels, seeds, epochs, threshold), dict(changes or {})
    )
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    environment = {
        "python": "3.11",
        "platform": "Linux-6",
        "processor": "x86_64",
        "device": "cpu",
        "packages": {"discl": "0.1.0"},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    results: dict[str, Any] = {}
    for index, (name, strategy) in enumerate(methods.items()):
        records = history(
            strategy, levels, epochs, epochs - 4, 0.02 * index, "validation" in splits
        )
        (folder / "train" / name).mkdir(parents=True, exist_ok=True)
        (folder / "train" / name / "history.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
        results[name] = {split: figures(names, amounts, 50, 0.03 * index) for split in splits}
        for split in splits:
            if domains:
                found = {
                    f"camera {each}": {
                        "images": 50 + each,
                        "accuracy": (each + 1) / 40 + index / 50,
                        "macro_f1": 0.2,
                    }
                    for each in range(domains)
                }
                worst = min(each["accuracy"] for each in found.values())
                results[name][split] |= {"per_domain": found, "worst_domain_accuracy": worst}
        adjusted = {**figures(names, amounts, 50, 0.05 + 0.02 * index), "prior": "real", "tau": 1.0}
        results[f"{name}+la"] = dict.fromkeys(splits, adjusted)
    (folder / "results.json").write_text(json.dumps(results))
    return write_report(
        folder, train, class_groups(amounts, 100, 20), describe_making(recipe, GENERATOR, 512)
    )


def _write_spectrum(
    folder: Path,
    names: Sequence[str],
    hard: Sequence[Mapping[str, Any]],
    levels: Sequence[int],
    seeds: int,
    size: tuple[int, int],
    threshold: float,
) -> None:
    plan, images, verdicts = [], [], []
    random = np.random.default_rng(0)
    drawn = {}
    for source in hard:
        for seed in range(seeds):
            for level in levels:
                name, label = f"{source['id']}-{seed}-{level}", source["label"]
                request = {
                    "id": name,
                    "source_id": source["id"],
                    "label": label,
                    "level": level,
                    "seed": seed,
                }
                drawn[label, level, seed] = drawn.get((label, level, seed)) or encode(
                    picture(label, level, seed, size)
                )
                cosine = float(np.float32(random.normal(0.27 + 0.001 * level, 0.03)))
                keep = cosine >= threshold
                plan.append(
                    {**request, "attempt": 0, "prompt": f"a photo of {names[label]}, seed {seed}"}
                )
                images.append({"id": name, "image": drawn[label, level, seed]})
                reason = "" if keep else f"clip_similarity {cosine:.3f} < {threshold:g}"
                verdicts.append(
                    {**request, "clip_similarity": cosine, "keep": keep, "reason": reason}
                )
    (folder / "spectrum").mkdir(exist_ok=True)
    half = len(images) // 2
    for part, rows in enumerate((images[:half], images[half:])):
        if rows:
            pq.write_table(
                pa.Table.from_pylist(rows),
                folder / "spectrum" / f"part-{part}.parquet",
                row_group_size=16,
            )
    pq.write_table(pa.Table.from_pylist(plan), folder / "plan.parquet")
    pq.write_table(pa.Table.from_pylist(verdicts), folder / "filter.parquet")


def _recipe(
    folder: Path,
    methods: Mapping[str, str],
    levels: Sequence[int],
    seeds: int,
    epochs: int,
    threshold: float,
) -> dict[str, Any]:
    return {
        "name": "small",
        "data": {"root": str(folder.resolve() / "birds"), "long_tail": None},
        "groups": {"many": 100, "few": 20},
        "hard": {"rule": "tail", "fewer_than": 20, "below": 0.5, "folds": 3},
        "prompts": {"templates": ["a photo of {class}"], "phrases": None, "negative": EVIL},
        "spectrum": {
            "checkpoint": "someone/model",
            "levels": list(levels),
            "seeds": seeds,
            "num_inference_steps": 50,
            "guidance_scale": 3.0,
        },
        "filter": {"checkpoint": "someone/clip", "threshold": threshold},
        "train": {
            "epochs": epochs,
            "curriculum_epochs": epochs - 4,
            "batch_size": 64,
            "image_size": 32,
            "seed": 0,
            "model": {"architecture": "resnet10"},
            "optimizer": {"name": "adam", "lr": 0.001, "schedule": "cosine"},
        },
        "methods": {
            name: {"strategy": strategy, "objective": "cross-entropy"}
            for name, strategy in methods.items()
        },
        "baseline": None,
    }


def read_summary(
    path: Path, changes: Mapping[str, Any] | None = None, generator: Generator = GENERATOR
) -> run_summary.RunSummary:
    """The summary of the module's run, with `changes` in its recipe."""
    recipe = load_recipe(path.parent / "recipe.yaml", dict(changes or {}))
    groups = {"many": [0], "medium": [1], "few": [2, 3]}
    summary = run_summary.read_run(
        path.parent, ["wren", "heron", "owl", EVIL], groups, describe_making(recipe, generator, 512)
    )
    return dataclasses.replace(summary, recipe=recipe.plain())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(
        tmp_path_factory.mktemp("runs") / "small", {"wren": 130, "heron": 40, "owl": 9, EVIL: 5}
    )


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_names_prompts_and_recipe_values_are_escaped(page: Page) -> None:
    assert "<script" not in page.html
    assert page.html.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;co&#34;") > 5
    assert f"“a photo of {EVIL}, seed 0”" in page.text
    assert any(EVIL in alt for alt in page.values("alt"))


def test_page_needs_no_network_and_no_script(page: Page) -> None:
    assert all(address.startswith("data:image/") for address in page.values("src"))
    assert all(address.startswith("#") for address in page.values("href"))
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|url\(|@import|//cdn", page.html)


def test_page_is_well_formed_and_has_its_sections(page: Page) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page.html)
    assert headings == [
        "What was run",
        "Results",
        "The spectrum",
        "The filter",
        "The curriculum",
        "Class by class",
        "Next steps",
    ]
    assert "<title>small · discl report</title>" in page.html
    assert all("alt" in attrs for tag, attrs in page.tags if tag == "img")
    for tag in (
        "div",
        "section",
        "table",
        "tr",
        "td",
        "th",
        "span",
        "p",
        "details",
        "figure",
        "svg",
    ):
        assert len(re.findall(rf"<{tag}[\s>]", page.html)) == page.html.count(f"</{tag}>"), tag


def test_all_methods_and_their_adjusted_rows_are_present(page: Page, path: Path) -> None:
    for name in json.loads((path.parent / "results.json").read_text()):
        assert re.search(rf"</i>{re.escape(name)}<", page.html)
    assert "logit adjustment: real class counts, τ = 1" in page.text
    assert "discl reaches" in page.text and "more than ce; on the few classes" in page.text
    assert "one run with one training seed, so there are no error bars." in page.text


def test_dropped_pictures_are_marked_with_their_reason(page: Page, path: Path) -> None:
    shown = {
        (attrs["alt"]) for tag, attrs in page.tags if tag == "img" and "synthetic" in attrs["alt"]
    }
    marked = page.having("dropped")
    verdicts = pq.read_table(path.parent / "filter.parquet").to_pylist()
    assert 0 < len(marked) < sum(not row["keep"] for row in verdicts) + 1
    assert len(marked) == sum(
        "dropped: clip_similarity" in alt
        for alt in re.findall(r'alt="(synthetic[^"]*)"', page.html)
    )
    assert all(
        "dropped: clip_similarity 0." in attrs["title"] and "&lt; 0.25" not in attrs["title"]
        for attrs in marked
    )
    assert shown


def test_the_gallery_shows_two_images_of_each_hard_class_rarest_first(page: Page) -> None:
    shown = re.findall(r"real image (train-\d+)", page.html)
    assert shown == [
        "train-00179",
        "train-00180",
        "train-00170",
        "train-00171",
        "train-00130",
        "train-00131",
    ]
    assert sum("synthetic" in alt for alt in page.values("alt")) == 6 * 2 * 3


def test_no_folder_of_the_machine_is_on_the_page(page: Page, path: Path) -> None:
    assert str(path.parent) not in page.html and "…/birds" in page.text
    assert "discl run small/recipe.yaml --out small" in page.text
    assert "discl predict small photos --method discl --out predictions.csv" in page.text


@pytest.mark.parametrize(
    ("changes", "generator", "told"),
    [
        (
            {},
            GENERATOR,
            {
                "hard images": "all images of classes with fewer than 20 training images",
                "generator": "someone/model (digest 0123abcd), Stable Diffusion 1.x/2.x",
                "levels λ": "0 %, 30 %, 50 %",
                "seeds": "2 per hard image and level",
                "guidance scale": "3 (as diffusers counts it)",
                "sampler": "DDIM; 50 inference steps; "
                "level λ takes the last ⌊(1 − λ) · 50⌋ of them",
                "pixels": "512 × 512; sources are cropped to their centre squares",
                "prompts": "“a photo of {class}”",
                "negative prompt": f"“{EVIL}”",
                "filter": "clip_similarity ≥ 0.25 with “a photo of {class}”, by someone/clip",
            },
        ),
        (
            {
                "spectrum.steps": "fixed",
                "spectrum.guidance_interval": [0.25, 1.0],
                "spectrum.tries": 3,
                "spectrum.resize": "keep-aspect",
                "spectrum.loras": [{"path": "/somewhere/ink.safetensors", "scale": 0.5}],
                "filter.threshold": -0.1,
                "prompts.phrases": "/somewhere/phrases.yaml",
                "prompts.names": {"owl": "barn owl"},
                "hard.rule": "probability",
            },
            GENERATOR,
            {
                "hard images": "images with a true-class probability below 0.5 "
                "by classifiers that did not train on them (3 folds)",
                "seeds": "2 per hard image and level, "
                "each with up to 3 tries until the filter keeps one",
                "sampler": "DDIM; 50 inference steps at every level, "
                "spread over the last (1 − λ) of the noise schedule",
                "guidance interval": "guided only at noise fractions in (0.25, 1], "
                "where 1 is pure noise",
                "pixels": "about 512 × 512 at the aspect of the source, at most 4 : 1",
                "LoRA": "ink.safetensors × 0.5",
                "prompts": "phrase list phrases.yaml; one per source and seed",
                "negative prompt": f"“{EVIL}”",
                "names in prompts": "differ from this data set for 1 of the classes",
                "filter": "clip_similarity ≥ −0.1 with “a photo of {class}”, by someone/clip",
            },
        ),
        (
            {
                "filter.rule": "alia",
                "filter.checkpoint": "/somewhere/clip",
                "spectrum.guidance_scale": 1.0,
                "prompts.endpoint": {
                    "url": "http://localhost:11434/v1",
                    "model": "/somewhere/writer",
                },
            },
            dataclasses.replace(GENERATOR, aesthetic=True),
            {
                "filter": "ALIA's two filters (arXiv 2305.16289) drop images that clip finds "
                "closer to a text that fits any picture than to “a photo of {class}”, and "
                "images that a classifier of the real images finds too easy or mislabelled",
                "guidance scale": "1, no guidance",
                "negative prompt": f"“{EVIL}”; no effect without guidance",
                "prompts": "descriptions of each class by writer, perhaps edited; "
                "one per source and seed",
                "aesthetic score": "6, and 2.5 for the unconditional branch",
            },
        ),
        (
            {
                "prompts.templates": ["a {class}", "{class}, {caption}"],
                "prompts.captions": {"checkpoint": "someone/captioner"},
            },
            FLUX,
            {
                "sampler": "Euler steps of the flow; 50 inference steps; "
                "level λ takes the last ⌊(1 − λ) · 50⌋ of them",
                "guidance scale": "3 (as diffusers counts it), an input of the network, "
                "which is guidance-distilled",
                "negative prompt": f"“{EVIL}”; no effect without guidance",
                "prompts": "“a {class}”; “{class}, {caption}”, captions by someone/captioner",
            },
        ),
    ],
)
def test_the_page_and_the_card_of_an_export_say_alike_how_the_images_were_made(
    path: Path, changes: dict[str, Any], generator: Generator, told: dict[str, str]
) -> None:
    summary = read_summary(path, changes, generator)
    assert {what: summary.making[what] for what in told} == told
    options = {
        "negative prompt",
        "names in prompts",
        "guidance interval",
        "aesthetic score",
        "LoRA",
    }
    assert options & set(summary.making) <= set(told), "what was not asked for is not told"
    settings = dict(words.describe_settings(summary))
    facts = describe_export(
        summary.making,
        summary.recipe["data"]["root"],
        summary.class_names,
        len(summary.hard),
        False,
    )
    card = make_card(
        "small",
        "imagefolder",
        1,
        class_names=summary.class_names,
        levels={0: (1, 2)},
        facts=facts,
    )
    for what, text in summary.making.items():
        assert text in settings[what[0].upper() + what[1:]]
        shown = re.escape(for_markdown(text))
        assert re.search(rf"^\| {re.escape(what)} \| .*{shown}", card, re.MULTILINE)
    assert (
        settings["Hard images"].startswith("54 of 184, in 3 classes: ")
        and "| hard images | 54: " in card
    )
    assert re.search(r"; \d+ of 324 synthetic images kept \(\d+ %\)\.$", settings["Filter"])
    assert "/somewhere" not in card and "/somewhere" not in "".join(settings.values())


@pytest.mark.parametrize("rule", ["threshold", "alia"])
def test_a_threshold_is_told_where_the_filter_goes_by_one(tmp_path: Path, rule: str) -> None:
    page = Page(
        make_run(
            tmp_path / "run", {"wren": 130, "owl": 9, "heron": 5}, changes={"filter.rule": rule}
        ).read_text()
    )
    told = page.text.split("What was run")[1].split("The full recipe")[0]
    expected = rule == "threshold"
    for text in (
        "threshold",
        "clip_similarity ≥ 0.25 with",
        "--set filter.threshold=",
        "another filter threshold",
        "grey: below the threshold",
    ):
        assert (text in told) == expected, text
    assert ("threshold" in "".join(page.values("aria-label", "title", "alt"))) == expected
    assert (
        bool(page.having("threshold"))
        == any(attrs["d"] for attrs in page.having("lost"))
        == expected
    )
    assert (
        "Filter"
        + "ALIA's two filters (arXiv 2305.16289) drop images that someone/clip finds closer"
        in told
    ) != expected
    assert "discl run" in told and "discl predict" in told


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "no image is generated or scored again, and only"),
        ({"spectrum.tries": 3}, "dropped images with tries left are generated again, and only"),
        ({}, "no classifier trained on them."),
        (
            {"methods.discl.threshold": 0.0},
            "no classifier trained on them, unless its method has another threshold.",
        ),
        (
            {"methods.discl.threshold": 0.0},
            "diverse-to-specific · cross-entropy · clip_similarity ≥ 0 · ",
        ),
    ],
)
def test_what_becomes_of_dropped_images_is_told(
    path: Path, changes: dict[str, Any], text: str
) -> None:
    html = page_module.render(read_summary(path, changes), gallery.Gallery((0, 30, 50), ()))
    assert text in Page(html).text


GIVEN = {f"methods.{name}.adjustment": {"prior": "effective", "tau": 1.5} for name in PLAIN}
NOT_CHOSEN = (
    "there is no validation split to choose prior and τ on, "
    "so they are class counts as trained on and τ = 1.5"
)


@pytest.mark.parametrize(
    ("splits", "offered", "given", "note"),
    [
        (("validation", "test"), [0.5, 1.5], (), "prior and τ were chosen on validation"),
        (("validation", "test"), [1.5], (), "the prior was chosen on validation"),
        (
            ("validation",),
            [0.5, 1.5],
            (),
            "prior and τ were chosen on the same images, which makes the figures optimistic",
        ),
        (
            ("test",),
            [0.25, 1.5],
            (),
            f"{NOT_CHOSEN}, the value in the recipe that is closest to 1",
        ),
        (("test",), [1.5], (), NOT_CHOSEN),
        (
            ("validation", "test"),
            [1.0],
            GIVEN,
            "prior and τ are those of the method in the recipe",
        ),
        (("validation",), [1.0], GIVEN, "prior and τ are those of the method in the recipe"),
        (("test",), [1.0], GIVEN, "prior and τ are those of the method in the recipe"),
        (
            ("validation", "test"),
            [0.5, 1.5],
            ("methods.ce.adjustment",),
            "for ce+la prior and τ are those of the method in the recipe; "
            "for discl+la prior and τ were chosen on validation",
        ),
        (
            ("test",),
            [1.5],
            ("methods.discl.adjustment",),
            f"for ce+la {NOT_CHOSEN}; for discl+la prior and τ are those of the method",
        ),
    ],
)
def test_the_note_on_adjusted_rows_says_where_prior_and_strength_come_from(
    path: Path, splits: tuple[str, ...], offered: list[float], given: Sequence[str], note: str
) -> None:
    summary = read_summary(
        path, {"evaluate.logit_adjustment": offered, **{key: GIVEN[key] for key in given}}
    )
    stated = {"prior": "effective", "tau": 1.5}
    results = {
        row: {
            split: {**figures[split], **(stated if row.endswith("+la") else {})} for split in splits
        }
        for row, figures in summary.results.items()
    }
    counts = {
        split: counts
        for split, counts in summary.split_counts.items()
        if split in ("train", *splits)
    }
    summary = dataclasses.replace(summary, results=results, split_counts=counts)
    assert words.adjustment_note(summary).startswith(note)
    text = Page(page_module.render(summary, gallery.Gallery((0, 30, 50), ()))).text
    assert (
        f"post-hoc logit adjustment; {note}" in text
        and "logit adjustment: class counts as trained on, τ = 1.5" in text
    )


@pytest.mark.parametrize(
    ("splits", "offered", "own", "note"),
    [
        (("validation", "test"), [0.0, 0.5], None, "τ was chosen on validation"),
        (
            ("test",),
            [0.0, 0.5],
            None,
            "there is no validation split to choose τ on, so it is 0.5, the value in the recipe "
            "that is closest to 0.5",
        ),
        (("test",), [0.5], None, "τ is the only value in the recipe"),
        (("test",), [], 0.5, "τ is that of the method in the recipe"),
    ],
)
def test_the_note_on_rows_with_divided_class_vectors_says_where_tau_comes_from(
    path: Path, splits: tuple[str, ...], offered: list[float], own: float | None, note: str
) -> None:
    summary = read_summary(
        path, {"evaluate.tau_normalisation": offered, "methods.ce.tau_normalisation": own}
    )
    assert words.normalisation_note(summary) == ""
    results = {
        row: {split: each[split] for split in splits} for row, each in summary.results.items()
    }
    results["ce+tau"] = {
        split: {**figures, "tau_normalisation": 0.5} for split, figures in results["ce"].items()
    }
    summary = dataclasses.replace(
        summary,
        results=results,
        split_counts={name: summary.split_counts[name] for name in ("train", *splits)},
    )
    text = Page(page_module.render(summary, gallery.Gallery((0, 30, 50), ()))).text
    assert f"divided by ‖w‖^τ (τ-normalisation); {note}." in text


def test_no_home_folder_is_on_the_page_wherever_the_recipe_names_one(tmp_path: Path) -> None:
    home = "/home/somebody/private"
    changes = {
        "data.files": {"train": f"{home}/train.txt"},
        "data.long_tail": {"n_max": 130, "imbalance_ratio": 3.25, "index": f"{home}/digests.txt"},
        "prompts.phrases": f"{home}/phrases.yaml",
        "spectrum.config": f"{home}/settings",
        "spectrum.loras": [{"path": f"{home}/style.safetensors"}],
        "methods.ce.train": {"model": {"architecture": "clip", "checkpoint": f"{home}/clip"}},
        "compare.tune.space": {"train.model.checkpoint": ["~/private/clip"]},
        "runtime.store": f"file://{home}/store",
    }
    page = Page(make_run(tmp_path, {"wren": 130, "heron": 40}, changes=changes).read_text())
    assert "somebody" not in page.html and "private" not in page.html
    for name in (
        "train.txt",
        "digests.txt",
        "phrases.yaml",
        "settings",
        "style.safetensors",
        "clip",
        "store",
    ):
        assert f"…/{name}" in page.text


def test_an_absent_group_is_a_dash_and_never_zero(tmp_path: Path) -> None:
    page = Page(make_run(tmp_path, {"wren": 130, "heron": 40}).read_text())
    assert "No class is in few." in page.text and "no such class" in page.text
    assert (
        len(page.having("absent")) == 1 + 4 + 4
    )  # the tile; four rows on test and four on validation
    assert re.search(r"on the medium classes", page.text)
    assert not re.search(
        r"\b0\.0\b",
        re.sub(
            r"±0\.0", "", page.text.split("The spectrum")[0].split("All")[0].split("Results")[1]
        ),
    )


@pytest.mark.parametrize("methods", [{"ce": "real-only"}, TWELVE])
@pytest.mark.parametrize("splits", [("validation",), ("test",)])
def test_any_number_of_methods_and_either_split_alone(
    tmp_path: Path, methods: dict[str, str], splits: tuple[str, ...]
) -> None:
    page = Page(
        make_run(tmp_path, {"wren": 6, "owl": 5}, methods, splits=splits, epochs=8).read_text()
    )
    assert f"top-1 on {splits[0]}" in page.text
    assert ("Validation accuracy" in page.text) == (splits == ("validation",))
    flattered = "the prior was chosen on the same images" in page.text
    assert flattered == (splits == ("validation",))
    assert all(f"Curriculum of {name}" in page.values("aria-label") for name in methods)
    assert len(page.having("dot")) == (0 if len(methods) == 1 else 11 * (2 * 2 + 2))


def test_figures_out_of_distribution_and_per_domain(tmp_path: Path) -> None:
    counts = {"deer": 200, "boar": 40, "ocelot": 6}
    path = make_run(
        tmp_path / "wild",
        counts,
        splits=("validation", "test", "validation-ood", "test-ood"),
        domains=33,
    )
    page = Page(path.read_text())
    headings = re.findall(r'<th scope="col">([^<]*)<', page.html)
    assert {"OOD all", "OOD macro F1", "OOD worst domain", "ECE", "worst domain"} <= set(headings)
    assert "Per domain on test-ood" in page.text and "30 of 33" in page.text
    rows = re.findall(r'<th scope="row">(camera \d+)</th>', page.html)
    assert rows == [f"camera {each}" for each in range(30)]
    for split in ("test-ood", "validation", "validation-ood"):
        assert f"The same on {split}" in page.text
    without = Page(make_run(tmp_path / "plain", counts).read_text())
    assert (
        "OOD" not in without.text
        and "worst domain" not in without.text
        and "Per domain" not in without.text
    )


def test_methods_with_synthetic_images_against_their_controls(tmp_path: Path) -> None:
    counts = {"cat": 150, "dog": 50, "owl": 8}
    methods = {"ce": "real-only", "under": "real-only", **TWO_SPECTRAL}
    changes = {"methods.under.undersample": True, "methods.all.sampling": "class-balanced"}
    page = Page(make_run(tmp_path, counts, methods, changes=changes).read_text())
    results = json.loads((tmp_path / "results.json").read_text())
    real = [row for row in results if not row.startswith(("discl", "all"))]
    best = max(real, key=lambda row: results[row]["validation"]["accuracy"])

    def points(row: str, other: str, metric: str) -> str:
        return words.points(100 * (results[row]["test"][metric] - results[other]["test"][metric]))

    few, overall = points("discl", "under", "few"), points("discl", best, "accuracy")
    assert f"disclunder{few}{overall}" in page.text
    assert f"all––{points('all', best, 'accuracy')}" in page.text
    assert "few − same mixture without synthetic images" in page.text
    assert f"{best}, chosen by top-1 on validation." in page.text
    added = "same-mixture: {strategy: real-only, undersample: true, sampling: class-balanced}"
    assert added in page.text


def test_the_headline_says_what_is_not_re_balancing(tmp_path: Path) -> None:
    counts = {"cat": 150, "dog": 50, "owl": 8}
    spectral = {"ce": "real-only", "discl": "diverse-to-specific"}
    alone = Page(make_run(tmp_path / "alone", counts, spectral).read_text())
    assert "no row has the same mixture without them" in alone.text
    under = {"methods.under.undersample": True}
    methods = {"ce": "real-only", "under": "real-only", "discl": "diverse-to-specific"}
    page = Page(make_run(tmp_path / "both", counts, methods, changes=under).read_text())
    results = json.loads((tmp_path / "both" / "results.json").read_text())
    gain = words.points(100 * (results["discl"]["test"]["few"] - results["under"]["test"]["few"]))
    assert f"(under), the difference in few is {gain} points" in page.text


def test_a_run_of_real_images_has_no_controls(tmp_path: Path) -> None:
    page = Page(make_run(tmp_path, {"cat": 150, "dog": 8}, {"ce": "real-only"}).read_text())
    assert "same mixture" not in page.text


def test_the_smallest_calibration_error_is_the_best() -> None:
    measured = {
        "a": {"accuracy": 0.5, "calibration_error": 0.2},
        "b": {"accuracy": 0.6, "calibration_error": 0.1},
    }
    rows = tables.result_rows(measured, [("accuracy", "all"), ("calibration_error", "ECE")])
    assert [[cell.best for cell in row.cells] for row in rows] == [[False, False], [True, True]]


def test_many_classes_and_levels_show_a_part_and_say_so(tmp_path: Path) -> None:
    counts = {f"class {label:02d}": 1 + (59 - label) // 10 for label in range(60)}
    page = Page(make_run(tmp_path, counts, levels=range(0, 100, 8), seeds=1, epochs=17).read_text())
    assert "30 of 60 classes: those with the largest change." in page.text
    assert "30 of 40 classes with a spectrum: those that lost the largest fraction." in page.text
    assert "at 8 of 13 levels" in page.text
    assert len(page.having("class-value")) == 31


def test_a_comparison_is_drawn_on_its_page_and_in_the_report(tmp_path: Path) -> None:
    rows = {
        "ce": {
            "figures": {"few": [0.10, 0.14], "all": [0.5, 0.6]},
            "intervals": {},
            "costs": {"UNet rows": 0},
            "published": {"few": 20.0},
        },
        "ce+la": {"figures": {"all": [0.5, 0.5]}, "intervals": {}, "costs": {}, "published": {}},
        EVIL: {
            "figures": {"few": [0.3, 0.3], "all": [0.7, 0.7]},
            "intervals": {"few": [18.0, 15.5, 20.5]},
            "costs": {},
            "published": {},
            "controls": {"few − mixture": None, "overall − best": [7.5, 6.5, 8.5]},
        },
    }
    told = {
        "seeds": [0, 1],
        "split": "test",
        "baseline": "ce",
        "notes": ["Chosen by accuracy.", "ce: as it stands"],
        "controls": {"notes": [f"Best: {EVIL}."], "lines": f"  same-mixture: {EVIL}\n"},
        "rows": rows,
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "comparison.json").write_text(json.dumps(told))
    report = Page(make_run(tmp_path / "run", {"cat": 150, "dog": 8}).read_text())
    own = Page(write_comparison(tmp_path / "run", EVIL).read_text())
    for drawn in (report, own):
        assert "script" not in {tag for tag, _ in drawn.tags}
        titles = [attrs["title"] for attrs in drawn.having("thirds") if "title" in attrs]
        assert titles == [
            "ce, few: 12.0 ± 2.8; the paper's 20.0",
            "ce, all: 55.0 ± 7.1",
            "ce+la, all: 50.0 ± 0.0",
            f"{EVIL}, few: 30.0 ± 0.0",
            f"{EVIL}, all: 70.0 ± 0.0",
        ]
        assert "+18.0 [+15.5, +20.5]" in drawn.text and "Chosen by accuracy." in drawn.text
        assert "+7.5[+6.5, +8.5]" in drawn.text and "overall − best" in drawn.text
        assert "difference [95 %]" not in drawn.text  # it stands below its figure
        assert f"Best: {EVIL}." in drawn.text and f"same-mixture: {EVIL}" in drawn.text
        assert len(drawn.having("diamond")) == 1
        lines = {attrs["style"] for attrs in drawn.having("base-line")}
        assert lines == {
            "left:10.00%",
            "left:25.00%",
        }  # 12 on an axis from 10 to 30, 55 on one from 50 to 70
    assert "Several seeds" in report.text and "tuned" not in report.text


@pytest.mark.parametrize("size", [(400, 150), (90, 300)])
def test_large_pictures_keep_the_page_small(tmp_path: Path, size: tuple[int, int]) -> None:
    path = make_run(
        tmp_path, {f"class {label}": 3 for label in range(7)}, levels=(0, 50), size=size
    )
    assert path.stat().st_size < 3_000_000
    uri = re.search(r'src="data:image/webp;base64,([^"]+)"', path.read_text())
    assert uri is not None
    assert max(Image.open(io.BytesIO(base64.b64decode(uri[1]))).size) == 160


def test_an_unfinished_run_is_refused_and_the_old_page_stays(tmp_path: Path) -> None:
    path = make_run(tmp_path, {"wren": 6, "owl": 5})
    before = path.read_bytes()
    assert not list(tmp_path.glob("*.new"))
    (tmp_path / "results.json").unlink()
    with pytest.raises(RunError, match=r"results\.json does not exist"):
        write_report(
            tmp_path,
            make_table(
                {"id": ["a"], "image": [encode(picture(0, 100, 0))], "label": [0]}, ["wren"]
            ),
            {"few": [0]},
            {},
        )
    assert path.read_bytes() == before


def test_axes_have_round_ticks() -> None:
    assert charts.nice_axis(0.31, 1.34).ticks == (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
    assert charts.nice_axis(45.2, 61.0, 4).ticks == (45, 50, 55, 60, 65)
    assert charts.epoch_axis(65).ticks == (0, 10, 20, 30, 40, 50, 60)
    assert charts.epoch_axis(3).ticks == (0, 1, 2, 3)
    flat = charts.nice_axis(2.0, 2.0)
    assert flat.low < 2.0 < flat.high
    assert charts.nice_axis(0, 10, 5).place(2.5) == 25


def test_a_history_becomes_stretches_of_equal_levels() -> None:
    records = [{"levels": levels} for levels in ([0], [0], [10, 30], [], [])]
    found = [(each.first, each.last, each.levels, each.text) for each in charts.segments(records)]
    assert found == [(1, 2, (0,), "0 %"), (3, 3, (10, 30), "10 % · 30 %"), (4, 5, (), "real only")]


def test_level_colours_meet_their_stops() -> None:
    assert [charts.level_colour(percent) for percent in (0, 50, 100)] == [
        "#5e42c4",
        "#ce4682",
        "#f3a83c",
    ]


def test_an_axis_does_not_stretch_to_a_threshold_far_away() -> None:
    values = np.asarray([0.2, 0.3])
    assert charts.similarity_axis(values, 0.35).high == pytest.approx(0.36)
    assert charts.similarity_axis(values, -1.0).low == pytest.approx(0.19)


def test_standard_errors_against_hand_computed_ones() -> None:
    measured = {"accuracy": 0.5, "images": 100, "per_class": {"a": 0.5, "b": 0.8}}
    found = tables.standard_errors(measured, ["a", "b"], [40, 60], {"few": [0, 1]})
    assert found["accuracy"] == pytest.approx(5.0)
    assert found["few"] == pytest.approx(100 * math.sqrt(0.25 / 40 + 0.16 / 60) / 2)


def test_figures_that_print_alike_share_the_mark() -> None:
    measured = {
        "a": {"accuracy": 0.50001, "few": 0.2},
        "b": {"accuracy": 0.50002},
        "c": {"accuracy": 0.4},
    }
    rows = tables.result_rows(measured, [("accuracy", "all"), ("few", "few")])
    assert [[cell.best for cell in row.cells] for row in rows] == [
        [True, False],
        [True, False],
        [False, False],
    ]
    assert [row.cells[1].value for row in rows] == [0.2, None, None]


def test_the_featured_method_is_chosen_by_strategy_and_compared_like_with_like(path: Path) -> None:
    summary = read_summary(path)
    assert (summary.baseline, summary.featured, summary.split) == ("ce", "discl", "test")
    assert [(row.name, row.against) for row in tables.differences(summary)] == [
        ("discl", "ce"),
        ("discl+la", "ce+la"),
    ]
    strategies = {
        "ce": "real-only",
        "text": "text-only",
        "up": "easy-to-hard",
        "down": "specific-to-diverse",
    }
    methods = {name: {"strategy": strategy} for name, strategy in strategies.items()}
    other = dataclasses.replace(summary, recipe={**summary.recipe, "methods": methods})
    assert other.featured == "up"


def test_levels_that_classes_take_on_their_own_are_counted_beside_the_curriculum(
    path: Path,
) -> None:
    summary = read_summary(path)
    apart = [
        {**record, "classes_apart": 1 + record["epoch"] % 3} if record["levels"] else record
        for record in summary.histories["discl"]
    ]
    other = dataclasses.replace(summary, histories={**summary.histories, "discl": apart})
    notes = {
        each.method: each.note
        for each in page_module.curricula(other, dict.fromkeys(summary.histories, "#000"))
    }
    assert (
        "1 to 3 classes used another level than the one shown" in notes["discl"]
        and "another level" not in notes["ce"]
    )


def test_numbers_in_words() -> None:
    assert [words.points(value) for value in (1.25, -3.04, 0.04, None)] == [
        "+1.2",
        "−3.0",
        "±0.0",
        "–",
    ]
    assert [words.percent(value) for value in (0.0, 0.5224, None)] == ["0.0", "52.2", "–"]
    assert [words.fraction(pair) for pair in ((0, 9), (239, 240), (1, 900), (3, 3))] == [
        "0 %",
        "99 %",
        "1 %",
        "100 %",
    ]
    assert [words.duration(seconds) for seconds in (12.4, 600, 8000)] == [
        "12 s",
        "10 min",
        "2 h 13 min",
    ]
    assert [words.cosine(value) for value in (0.1234, -0.0001, -0.0126)] == [
        "0.123",
        "0.000",
        "−0.013",
    ]
    assert gallery.spread(list(range(10)), 4) == [0, 3, 6, 9]


def test_a_browser_renders_the_page(path: Path, tmp_path: Path) -> None:
    browser = next(
        (
            found
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (found := shutil.which(name))
        ),
        None,
    )
    if browser is None:
        pytest.skip("no Chromium is installed")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", path.resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=500,
    )
    dom = Page(done.stdout)
    written = Page(path.read_text(encoding="utf-8"))
    assert "discl reaches" in dom.text
    assert (
        sum(tag == "img" for tag, _ in dom.tags)
        == sum(tag == "img" for tag, _ in written.tags)
        > 36
    )
    assert sum(tag == "path" for tag, _ in dom.tags) == sum(
        tag == "path" for tag, _ in written.tags
    )


GAIN = {"mean": 3.0, "low": 1.0, "high": 5.0}


def write_pilot(folder: Path, generate: bool = True) -> dict[str, Any]:
    """A pilot of one candidate with a hostile name; one level has too few kept images."""
    spread = {"mean": 0.8, "quarter": 0.7, "median": 0.8, "three_quarters": 0.9}
    row = {"candidate": EVIL, "threshold": 0.25, "images": 24, "kept": 0.5, "rows_per_kept": 40.0}
    worth = {"few": GAIN, "overall": None, "recognised": 0.875}
    level = {
        "level": 30,
        "steps": 7,
        "images": 24,
        "image_similarity": spread,
        "text_similarity": spread,
        "kept": 0.5,
        "kept_at_proposal": 0.25,
    }
    pilot = {
        "judge": "a small network, trained from scratch on 32 pixels",
        "mixture": "class-balanced",
        "outcomes": [
            {**row, "level": None, "precision": 0.9, "coverage": None, "worth": worth},
            {**row, "level": 30, "precision": 0.9, "coverage": 0.4, "worth": worth},
            {**row, "level": 0, "precision": None, "coverage": None, "worth": None},
        ],
        "thresholds": [{"candidate": EVIL, "threshold": 0.25, "kept": 0.5, "worth": worth}],
        "levels": {
            EVIL: {
                "sources": 24,
                "seeds": 1,
                "threshold": 0.25,
                "real": {"text_similarity": spread, "pair_similarity": None, "kept": 0.9},
                "levels": [level],
                "proposal": {"levels": [30], "threshold": 0.28, "reasons": ["a likely reason"]},
            }
        },
        "failed": {"gone": "there is no checkpoint folder '/home/me/nowhere'. Give another."},
        "advice": {"generate": False, "reasons": ["do not generate"], "recipe": {}},
    }
    if generate:
        pilot["advice"] = {
            "generate": True,
            "candidate": EVIL,
            "levels": [30],
            "threshold": 0.25,
            "strategy": "fixed",
            "reasons": ["it brings 3 points"],
            "recipe": {"spectrum.checkpoint": "/home/me/model", "spectrum.levels": [30]},
        }
    (folder / "pilot").mkdir(parents=True)
    (folder / "pilot/pilot.json").write_text(json.dumps(pilot))
    return pilot


def write_adapter(folder: Path, recorded: bool = True) -> None:
    (folder / "adapted").mkdir(parents=True)
    (folder / "adapter.json").write_text(json.dumps({"file": "0011.safetensors"}))
    (folder / "adapted/0011.safetensors").write_bytes(b"weights")
    record = {"images": 41, "classes": 3, "values": 7680, "seconds": 200.0}
    losses = [[step, 1 / step] for step in range(10, 501, 10)]
    if recorded:
        (folder / "adapted/0011.json").write_text(json.dumps({**record, "losses": losses}))


def test_a_pilot_is_shown_with_its_recommendation(tmp_path: Path) -> None:
    write_pilot(tmp_path)
    page = Page(make_run(tmp_path, {"many": 30, "rare": 5}).read_text())
    assert "level 30, threshold 0.25, strategy fixed" in page.text
    assert "it brings 3 points" in page.text and "levels: [30]" in page.text
    assert "a likely reason" in page.text and "87.5 %" in page.text
    assert len(page.having("chosen")) == 3, "a level, a threshold, and what similarity proposes"
    assert len(page.having("interval")) == 3, "none for too few images"
    assert "…/model" in page.text and "'…/nowhere'" in page.text and "/home/me" not in page.html
    assert "<script" not in page.html and EVIL in page.text
    assert "#pilot" in page.values("href") and "#adaptation" not in page.values("href")


def test_a_pilot_that_advises_against_it_says_so(tmp_path: Path) -> None:
    write_pilot(tmp_path, generate=False)
    page = Page(make_run(tmp_path, {"many": 30, "rare": 5}).read_text())
    assert "advises against" in page.text and "do not generate" in page.text


def test_a_pilot_that_is_undecided_or_of_an_earlier_version_is_shown(tmp_path: Path) -> None:
    """The judge of an earlier version was always a head, on features that it named."""
    pilot = write_pilot(tmp_path, generate=False)
    pilot["advice"] |= {"undecided": True, "reasons": ["not decided"]}
    pilot["judge"] = EVIL
    file = tmp_path / "pilot/pilot.json"
    file.write_text(json.dumps(pilot))
    page = Page(make_run(tmp_path, {"many": 30, "rare": 5}).read_text())
    assert "cannot tell yet" in page.text and "not decided" in page.text
    assert "<script" not in page.html and EVIL in page.text
    del pilot["judge"], pilot["advice"]["undecided"]
    file.write_text(json.dumps(pilot | {"features": "embedded:fashion-mnist/clip"}))
    page = Page(make_run(tmp_path, {"many": 30, "rare": 5}).read_text())
    assert "the gain of a linear head on features of embedded:fashion-mnist/clip" in page.text
    assert "advises against" in page.text


def test_an_adaptation_is_shown_with_settings_loss_seconds_and_digest(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    changes = {"spectrum.adapt": {"rank": 4, "steps": 500, "learning_rate": 1e-4}}
    page = Page(make_run(tmp_path, {"many": 30, "rare": 5}, changes=changes).read_text())
    assert "rank 4, attention: 7,680 values" in page.text
    assert "500 steps of 4 images, learning rate 0.0001" in page.text
    assert "loss 0.100 at first, 0.002 at the end; 3 min" in page.text
    digest = weights_digest(tmp_path / "adapted/0011.safetensors")
    assert f"0011.safetensors, digest {digest[:16]}" in page.text
    assert any("Loss over steps" in label for label in page.values("aria-label"))


def test_class_tokens_are_shown_beside_the_weights_or_alone(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    pointer, tokens = tmp_path / "adapter.json", "0011-tokens.safetensors"
    (tmp_path / "adapted" / tokens).write_bytes(b"tokens")
    settings = Adapt(rank=4, class_tokens=2).model_dump()
    pointer.write_text(json.dumps({"file": "0011.safetensors", "tokens": tokens}))
    found = read_adaptation(tmp_path, {"spectrum": {"adapt": settings}})
    texts = [text for _, text in found.facts]
    assert "rank 4, attention and 2 tokens for each class: 7,680 values" in texts
    assert any("learning rate 0.0001, 0.0005 for the tokens" in text for text in texts)
    pointer.write_text(json.dumps({"tokens": tokens}))
    found = read_adaptation(tmp_path, {"spectrum": {"adapt": settings | {"rank": 0}}})
    assert found.chart is not None and len(found.facts) == 3
    digest = weights_digest(tmp_path / "adapted" / tokens)
    assert ("File", f"{tokens}, digest {digest[:16]}") in found.facts
    recipe = load_recipe("fashion-lt", {"spectrum.adapt": {"rank": 0, "class_tokens": 2}})
    made = describe_making(recipe, GENERATOR, 32)["adapted"]
    assert made.startswith("2 class tokens in the place of each class name, 500 steps")


def test_weights_of_an_earlier_version_have_no_record(tmp_path: Path) -> None:
    write_adapter(tmp_path, recorded=False)
    changes = {"spectrum.adapt": {"rank": 4}}
    page = Page(make_run(tmp_path, {"many": 30, "rare": 5}, changes=changes).read_text())
    assert "rank 4, attention" in page.text and "Loss over steps" not in page.html
