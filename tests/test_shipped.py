"""Shipped recipes on miniatures: all are loaded and planned, one per data set is run whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from discl.assets import PHRASES, PUBLISHED, published_figures
from discl.data import exponential_counts
from discl.data.images import keep_aspect
from discl.errors import RecipeError
from discl.evaluation.comparison import as_cells
from discl.levels import start_step
from discl.pipeline import results_table, run_until
from discl.recipe import RECIPES, describe_shipped, load_recipe, shipped_recipes
from discl.run_folder.open import open_run
from discl.stages.compare import make_entries, measured_columns
from helpers import miniatures

IMAGES_OF_CIFAR = 24  # of the first class, down to 2 of the last

LIGHT = [name for name in shipped_recipes() if "-light" in name]
PAPER = [
    name
    for name in shipped_recipes()
    if name not in LIGHT and not name.startswith(("fashion", "cifar10-"))
]
HARD = {
    "imagenet-lt": 1643,
    "inaturalist": 44956,
    "cifar100-lt-ir100": 325,
    "cifar100-lt-ir50": 269,
    "iwildcam-b16-flyp-alia": 129809,
    "iwildcam": 8260,
}
"""Number of hard images.

Published numbers, except for CIFAR100-LT, where the profile gives one more, and for ALIA, which
uses all training images.
"""


def cifar(folder: Path) -> Path:
    names = [
        name.replace(" ", "_") for name in yaml.safe_load((PHRASES / "cifar100.yaml").read_text())
    ]  # as the set itself writes them
    return miniatures.cifar100(folder, names, exponential_counts(100, IMAGES_OF_CIFAR, 12))


MINIATURES: dict[str, Callable[[Path], Path]] = {
    "imagenet-lt": miniatures.imagenet_lt,
    "cifar100-lt": cifar,
    "inaturalist2018": miniatures.inaturalist2018,
    "iwildcam": miniatures.iwildcam,
}


def data_set_of(name: str) -> str:
    return next(each for each in MINIATURES if name.startswith(each))


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return {name: build(folder / name) for name, build in MINIATURES.items()}


@pytest.fixture
def small(
    roots: dict[str, Path], tiny_diffusion: Path, tiny_clip: Path
) -> Callable[[str], dict[str, Any]]:
    """Replacements of data, checkpoints and sizes; the subject of the recipe stays."""

    def overrides(name: str) -> dict[str, Any]:
        values = {
            "data.root": str(roots[data_set_of(name)]),
            "spectrum.checkpoint": str(tiny_diffusion),
            "spectrum.num_inference_steps": 10,
            "spectrum.size": None,
            "spectrum.dtype": "float32",
            "spectrum.seeds": 1,
            "filter.checkpoint": str(tiny_clip),
            "filter.threshold": -1,
            "train.image_size": 32,
            "train.resize": None,
            "train.model.width": 4,
            "train.batch_size": 16,
            "train.steps_per_epoch": 2,
            "runtime.workers": 0,
            "runtime.slots": 16,
        }
        if name.startswith("cifar"):
            values |= {
                "data.long_tail.n_max": IMAGES_OF_CIFAR,
                "data.long_tail.imbalance_ratio": 12,
                "hard.fewer_than": 3,
                "data.long_tail.index": None,
            }
        if name.startswith("imagenet-lt"):
            values["prompts.phrases"] = None  # the miniature's hard classes are no tail classes
        if name in LIGHT:
            del values["train.model.width"]
            values |= {"train.model.checkpoint": str(tiny_clip), "evaluate.test_time_margin": None}
            return values
        if name.startswith("iwildcam"):
            del values["train.model.width"]
            values |= {"train.model.checkpoint": str(tiny_clip), "train.optimizer.warm_up_steps": 1}
            for method, asked in load_recipe(name).methods.items():
                if asked.guidance_images:
                    values |= {
                        f"methods.{method}.guidance_images": 6,
                        f"methods.{method}.probe_samples": 16,
                    }
        return values

    return overrides


@pytest.mark.parametrize("name", PAPER)
def test_header_tells_row_command_cost_and_score(name: str) -> None:
    recipe, header = load_recipe(name), (RECIPES / f"{name}.yaml").read_text().split("extends:")[0]
    assert f"command: discl run {name}" in header
    asked = recipe.spectrum
    hard = next(count for start, count in HARD.items() if name.startswith(start))
    rows = (
        sum(start_step(level, asked.num_inference_steps) for level in asked.levels)
        * asked.seeds
        * hard
        * 2
    )
    assert (
        f"cost: {hard * len(asked.levels) * asked.seeds:,} images, {rows:,} UNet rows "
        f"({hard:,} hard images" in header
    )
    assert asked.guidance_scale > 1  # two UNet rows a step
    further = {1: "", 6: "up to five times as many in further tries"}[asked.tries]
    assert further in header and (bool(further) == ("further tries" in header))
    assert "FLOP" not in header  # nothing here measures it
    score = header.split("expected score: ")[1]
    if recipe.compare.published is None:
        assert score.startswith("not published")
        return
    figures = published_figures(recipe.compare.published)
    assert recipe.compare.rows.get(row := list(recipe.methods)[-1], row) in figures, (
        f"{row} is no row of {recipe.compare.published}"
    )
    rows = {*recipe.methods, *(recipe.compare.rows if "+ WE" in header else ())}
    published = {
        tuple(figures[row].values())
        for row in (recipe.compare.rows.get(each, each) for each in rows)
        if row in figures
    }
    stated = re.findall(r"(?<![\d./])[\d.]+(?:/[\d.]+)+|few [\d.]+", score.split("# differs")[0])
    told = {
        tuple(float(number) for number in each.removeprefix("few ").split("/")) for each in stated
    }
    gains = {row for row in told if len(row) == 5}  # of the worst classes, which no table has
    assert told - gains == published
    for method, word in (("cuda", "CUDA"), ("ldmlr", "LDMLR")):
        known = [row for row in recipe.methods if row.endswith(method) and row in figures]
        assert (f"+ {word}" in header.split("command:")[0]) == bool(known)


@pytest.mark.parametrize("name", PAPER)
def test_header_tells_what_differs_from_the_paper(name: str) -> None:
    recipe, header = load_recipe(name), (RECIPES / f"{name}.yaml").read_text().split("extends:")[0]
    text = re.sub(r"\s*\n#\s*", " ", header)
    differs = text.split("differs from the paper: ")[1]
    assert "docs/fidelity.md" in differs
    if recipe.filter.rule != "alia":  # ALIA's CLIP has safetensors
        assert recipe.filter.checkpoint == "openai/clip-vit-base-patch32"  # as the thresholds
        assert "discl convert openai/clip-vit-base-patch32 clip-b32" in text
        assert "--set filter.checkpoint=clip-b32" in text
    if not name.startswith("iwildcam"):
        own = "scenes of ours" if recipe.prompts.phrases is None else "descriptions of each"
        assert own in differs
    assert max(map(len, header.splitlines())) <= 140


def test_scenes_are_ten_of_fifteen_words_that_name_the_class_once() -> None:
    sets = {
        tuple(recipe.prompts.templates)
        for name, recipe in ((name, load_recipe(name)) for name in PAPER)
        if name.startswith(("imagenet-lt", "inaturalist"))
    }
    assert len(sets) == 2
    for scenes in sets:
        assert len(set(scenes)) == len(scenes) == 10
        assert min(len(context.split()) for context in scenes) >= 15
        assert all(context.count("{class}") == 1 for context in scenes)
    assert not set.intersection(*map(set, sets))


def test_scales_of_the_ablation() -> None:
    methods = load_recipe("imagenet-lt-ce-discl-scales").methods
    assert sorted(
        each.synthetic_scale for each in methods.values() if each.strategy != "real-only"
    ) == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]


def test_every_published_row_has_a_recipe() -> None:
    tables = yaml.safe_load(PUBLISHED.read_text())
    found = {table: set() for table in tables}
    for recipe in map(load_recipe, PAPER):
        if recipe.compare.published:
            rows = {*recipe.methods, *recipe.compare.rows}
            found[recipe.compare.published] |= {recipe.compare.rows.get(row, row) for row in rows}
    assert not {
        (table, row)
        for table, rows in tables.items()
        for row in set(rows) - found[table] - {"columns"}
    }


@pytest.mark.parametrize(("threshold", "few"), [(28, 23.69), (32, 22.88)])
def test_another_threshold_is_compared_with_its_own_row(threshold: int, few: float) -> None:
    recipe = load_recipe(f"imagenet-lt-ce-discl-threshold-{threshold}")
    row = f"ce-discl-threshold-{threshold}"
    assert (list(recipe.methods), recipe.filter.threshold) == (["ce", row], threshold / 100)
    assert published_figures(recipe.compare.published or "")[row] == {"few": few}


def test_data_sets_with_splits_of_their_own_are_never_divided() -> None:
    assert {
        (recipe.data.own_split.validation, recipe.data.own_split.test)
        for recipe in map(load_recipe, PAPER)
    } == {(0, 0)}


def test_settings_of_the_paper() -> None:
    recipe = load_recipe("imagenet-lt-ce-discl")
    assert list(recipe.spectrum.levels) == [0, 10, 30, 50]
    assert (
        recipe.spectrum.seeds,
        recipe.spectrum.num_inference_steps,
        recipe.spectrum.guidance_scale,
    ) == (8, 50, 10)
    assert (recipe.train.epochs, recipe.train.curriculum_epochs, recipe.train.batch_size) == (
        65,
        60,
        128,
    )
    assert (
        recipe.train.optimizer.name,
        recipe.train.optimizer.lr,
        recipe.train.optimizer.schedule,
    ) == ("adam", 0.001, "cosine")
    assert (recipe.filter.threshold, recipe.hard.fewer_than) == (0.3, 20)
    assert recipe.train.augment == ["random-resized-crop", "flip", "color-jitter"]
    assert (recipe.train.resize_mode, recipe.train.optimizer.weight_decay) == ("whole", 1e-5)
    assert (recipe.spectrum.tries, recipe.spectrum.resize) == (6, "keep-aspect")
    assert recipe.spectrum.checkpoint == "stabilityai/stable-diffusion-xl-refiner-1.0"
    wild = load_recipe("iwildcam-b16-flyp-discl")
    assert wild.train.optimizer.decay_vectors
    assert (wild.hard.exclude, wild.train.resize_mode) == (["empty landscape"], "whole")
    asked = (wild.spectrum.size or 0, 8)  # 8: of SDXL's VAE
    assert (keep_aspect(1920, 1080, *asked), keep_aspect(2048, 1536, *asked)) == (
        (480, 272),
        (416, 304),
    )
    alia = load_recipe("iwildcam-b16-flyp-alia")
    assert len(alia.prompts.templates) == 4 and alia.filter.positive == "a wildlife photo"
    assert (
        wild.train.epochs,
        wild.train.curriculum_epochs,
        wild.train.batch_size,
        wild.filter.threshold,
    ) == (20, 15, 256, 0.25)
    assert (
        wild.train.optimizer.name,
        wild.train.optimizer.lr,
        wild.train.optimizer.weight_decay,
    ) == ("adamw", 1e-5, 0.2)
    assert (wild.methods["discl"].guidance_images, wild.methods["discl"].probe_samples) == (
        2000,
        30000,
    )
    assert load_recipe("iwildcam-l14-flyp-discl").train.batch_size == 200
    for name in PAPER:
        if name.startswith(("imagenet-lt", "inaturalist2018", "cifar100-lt")):
            found = load_recipe(name)
            assert found.train.model.architecture == (
                "resnet34" if "resnet34" in name else "resnet10"
            )
            assert found.train.batch_size == 128
    few = [load_recipe(f"cifar100-lt-ir{ratio}-ce-discl") for ratio in (100, 50)]
    for recipe, total in zip(few, (10847, 12608), strict=True):
        assert recipe.data.long_tail is not None
        counts = exponential_counts(
            100, recipe.data.long_tail.n_max, recipe.data.long_tail.imbalance_ratio
        )
        assert sum(counts) == total
        assert sum(count for count in counts if count < recipe.hard.fewer_than) in HARD.values()


def test_cuda_has_the_operations_that_its_authors_released() -> None:
    systems = [each.system for name in PAPER for each in load_recipe(name).methods.values()]
    cuda = [asked for asked in systems if isinstance(asked, dict) and asked["name"] == "cuda"]
    assert len(cuda) >= 10 and {asked["operations"] for asked in cuda} == {"released"}


def test_bases_are_no_recipes_and_every_one_is_used() -> None:
    bases = {path.name for path in (RECIPES / "base").glob("*.yaml")}
    lines = [
        line
        for path in RECIPES.rglob("*.yaml")
        for line in path.read_text().splitlines()
        if line.startswith("extends: ")
    ]
    used = set(re.findall(r"[\w-]+\.yaml", "\n".join(lines)))
    assert bases <= used <= bases | {f"{name}.yaml" for name in shipped_recipes()}
    assert not {path.stem for path in (RECIPES / "base").glob("*.yaml")} & set(shipped_recipes())
    assert all(describe_shipped(name) for name in shipped_recipes())


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_a_miniature_is_planned(
    name: str, small: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    overrides = small(name) | (
        {"hard.rule": "tail"} if name.startswith("iwildcam") else {}
    )  # finding hard ones trains classifiers
    opened = open_run(load_recipe(name, overrides), tmp_path / "run")
    planned = pq.read_table(run_until(opened, "plan")).to_pandas()
    hard = pq.read_table(opened.path("hard.parquet")).num_rows
    assert hard > 0
    assert set(planned["level"]) == set(load_recipe(name).spectrum.levels)
    assert len(planned) == hard * len(opened.recipe.spectrum.levels)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()) == opened.recipe.plain()
    if name.startswith("imagenet-lt"):
        texts = [text.removeprefix("a 8k real photo: ") for text in planned["prompt"]]
        assert set(texts) <= {
            template.replace("{class}", name)
            for template in opened.recipe.prompts.templates
            for name in ("goldfish", "flamingo")
        }
        assert len(set(texts)) > 4 and not set(texts) & set(planned["prompt"])


@pytest.mark.parametrize("name", LIGHT)
def test_settings_of_light_tuning(name: str) -> None:
    """Those of LIFT's released configuration."""
    recipe, header = load_recipe(name), (RECIPES / f"{name}.yaml").read_text().split("extends:")[0]
    train, light = recipe.train, recipe.train.model.light
    assert (train.epochs, train.batch_size, train.image_size) == (
        20 if name.startswith("inaturalist") else 10,
        128,
        224,
    )
    optimizer = train.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (
        "sgd",
        0.01,
        0.9,
        0.0005,
    )
    assert (optimizer.schedule, optimizer.warm_up_steps, optimizer.decay_vectors) == (
        "cosine",
        None,
        True,
    )
    assert (light.adapter, light.width, light.head, light.scale) == (
        "adaptformer",
        "auto",
        "cosine",
        25,
    )
    assert (recipe.evaluate.test_time_crops, recipe.evaluate.test_time_margin) == (5, 24)
    assert recipe.methods["light"].loss.name == "logit-adjusted"
    assert f"command: discl run {name}" in header and "# cost: " in header
    assert "# published: " in header and "# differs from " in header
    asked, made = recipe.spectrum, name.endswith("-discl")
    assert asked.makes_none != made
    if made:
        hard = next(count for start, count in HARD.items() if name.startswith(start))
        images = hard * len(asked.levels) * asked.seeds
        steps = [start_step(level, asked.num_inference_steps) for level in asked.levels]
        rows = 2 * sum(steps) * asked.seeds * hard
        assert f"cost: {images:,} images, {rows:,} UNet rows ({hard:,} hard images" in header
        control = recipe.methods["light-repeat"]
        for each in ("light-text-only", "light-all-levels", "light-discl"):
            method = recipe.methods[each]
            assert (method.mixture, method.prior) == (control.mixture, control.prior)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "imagenet-lt-clip-light-discl",
        "cifar100-lt-ir100-clip-light",
        "inaturalist2018-clip-light",
        "iwildcam-b16-light",
    ],
)
def test_light_tuning_for_two_epochs(
    name: str, small: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    made = name.endswith("-discl")
    short: dict[str, Any] = {"train.epochs": 2, "train.curriculum_epochs": int(made)}
    if made:
        short["spectrum.levels"] = [0]
    opened = open_run(load_recipe(name, small(name) | short), tmp_path / "run")
    results = json.loads(run_until(opened, "evaluate").read_text())
    assert set(opened.recipe.methods) <= set(results)
    planned = pq.read_table(opened.path("plan.parquet")).num_rows
    assert (planned > 0) == made == bool(list(opened.path("spectrum").glob("*.parquet")))


def test_phrases_of_the_tail_are_told_where_hard_classes_have_other_names(
    small: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    name = "imagenet-lt-ce-discl"
    overrides = small(name) | {"prompts.phrases": "embedded:imagenet-lt"}
    with pytest.raises(RecipeError, match=r"2 classes that need them: goldfish, flamingo\."):
        run_until(open_run(load_recipe(name, overrides), tmp_path / "run"), "plan")


CHAINS = (
    "imagenet-lt-ce-discl",
    "cifar100-lt-ir100-bs-discl",
    "inaturalist2018-ce-discl",
    "iwildcam-b16-flyp-discl",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_the_whole_chain_for_two_epochs(
    name: str, small: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    levels = [load_recipe(name).spectrum.levels[0]]
    short = {
        "train.epochs": 2,
        "train.curriculum_epochs": 1,
        "train.optimizer.warm_up_epochs": 0,
        "spectrum.levels": levels,
    }
    if name.startswith("iwildcam"):
        short |= {
            "hard.below": 1.0,
            "hard.folds": 2,
            "hard.epochs": 1,
            "evaluate.weight_ensembling": [0.5, 1.0],
        }
    opened = open_run(load_recipe(name, small(name) | short), tmp_path / "run")
    page = run_until(opened, "report")
    assert page.stat().st_size > 10_000
    assert levels[0] in opened.recipe.spectrum.levels
    results = (tmp_path / "run" / "results.json").read_text()
    assert all(f'"{method}"' in results for method in opened.recipe.methods)
    if name.startswith("iwildcam"):
        figures = json.loads(results)["discl"]
        assert set(figures["test-ood"]["per_domain"]) == {
            "4"
        }  # the camera of that split, by iWildCam's `location_remapped`
        assert figures["test-ood"]["worst_domain_accuracy"] == figures["test-ood"]["accuracy"]
        assert "OOD F1" in results_table(opened).splitlines()[0]
        _, columns = measured_columns(opened)
        heading, rows = as_cells(
            make_entries(opened, [opened], columns), [name for _, _, name in columns]
        )
        assert heading[-2:] == ["ID macro F1, published", "OOD macro F1, published"]
        assert {
            row[0]: row[-2:] for row in rows if row[0] in ("lp-ft", "flyp+we", "discl", "discl+we")
        } == {
            "lp-ft": ["49.7", "34.7"],
            "flyp+we": ["52.0", "36.4"],
            "discl": ["54.3", "38.2"],
            "discl+we": ["54.6", "38.7"],
        }
        assert "OOD macro F1" in page.read_text() and "Per domain on test-ood" in page.read_text()
