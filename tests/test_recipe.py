"""The recipe: refused values and their messages, overrides, paths, to YAML and back."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from discl.errors import RecipeError
from discl.levels import REAL
from discl.recipe import Recipe, load_recipe, parse_override, shipped_recipes, validate
from helpers import miniatures

REQUIRED = miniatures.REQUIRED


def with_values(**values: Any) -> Recipe:
    """The smallest recipe with some values replaced; `__` stands for the dot."""
    return load_recipe(REQUIRED, {key.replace("__", "."): value for key, value in values.items()})


def test_the_smallest_recipe_has_the_defaults_of_the_paper() -> None:
    recipe = validate(REQUIRED)
    assert recipe.spectrum.levels == [0, 50]
    assert (recipe.train.epochs, recipe.train.curriculum_epochs, recipe.filter.threshold) == (
        65,
        60,
        0.3,
    )
    assert (recipe.groups.many, recipe.groups.few, recipe.baseline) == (100, 20, None)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_tell_their_cost(name: str) -> None:
    from discl import recipe

    assert load_recipe(name).name == name
    header = (recipe.RECIPES / f"{name}.yaml").read_text().split("name:")[0]
    for word in ("row:", "command:", "cost:"):
        assert word in header
    assert "expected score:" in header or "published:" in header


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_survives_yaml(name: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.yaml"
    path.write_text(load_recipe(name).to_yaml())
    again = load_recipe(path)
    assert again == load_recipe(name)
    assert again.to_yaml() == path.read_text()


def test_plain_is_the_whole_tree_in_plain_values() -> None:
    recipe = with_values(
        methods={"half": {"strategy": "fixed", "level": 50}}, prompts__negative="ä"
    )
    plain = recipe.plain()
    assert plain["spectrum"]["levels"] == [0, 50]
    expected = {
        "strategy": "fixed",
        "level": 50,
        "objective": "cross-entropy",
        "prior": "real",
        "undersample": None,
        "synthetic_scale": 3.0,
        "shortage": "repeat",
        "fine_tune": "full",
        "sampling": "instance",
        "train": {},
    }
    assert {key: plain["methods"]["half"][key] for key in expected} == expected
    assert yaml.safe_load(recipe.to_yaml()) == plain
    assert "negative: ä" in recipe.to_yaml()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trian", r"unknown key in the recipe 'trian'; known: .* Did you mean 'train'\?"),
        ("data.rot", r"unknown key in data 'rot'; known: .* Did you mean 'root'\?"),
        (
            "data.own_split.validaton",
            r"unknown key in data\.own_split 'validaton'; .* Did you mean 'validation'\?",
        ),
        (
            "data.splits.trian",
            r"unknown key in data\.splits 'trian'; known: test, test-ood, train, validation, "
            r"validation-ood\. Did you mean 'train'\?",
        ),
        ("data.columns.lable", r"unknown key in data\.columns 'lable'; .* Did you mean 'label'\?"),
        ("groups.meny", r"unknown key in groups 'meny'; known: few, many\. Did you mean 'many'\?"),
        ("hard.fewer_then", r"unknown key in hard 'fewer_then'; .* Did you mean 'fewer_than'\?"),
        ("prompts.template", r"unknown key in prompts 'template'; .* Did you mean 'templates'\?"),
        (
            "spectrum.guidance_scal",
            r"unknown key in spectrum 'guidance_scal'; .* Did you mean 'guidance_scale'\?",
        ),
        ("filter.treshold", r"unknown key in filter 'treshold'; .* Did you mean 'threshold'\?"),
        ("train.epoch", r"unknown key in train 'epoch'; .* Did you mean 'epochs'\?"),
        ("train.model.stemm", r"unknown key in train\.model 'stemm'; .* Did you mean 'stem'\?"),
        (
            "train.optimizer.learning_rate",
            r"unknown key in train\.optimizer 'learning_rate'; known: .*lr, milestones, ",
        ),
        (
            "methods.ce.startegy",
            r"unknown key in methods\.ce 'startegy'; .* Did you mean 'strategy'\?",
        ),
        ("evaluate.worstk", r"unknown key in evaluate 'worstk'; .* Did you mean 'worst_k'\?"),
        ("runtime.slot", r"unknown key in runtime 'slot'; .* Did you mean 'slots'\?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(REQUIRED, {key: 1})


def test_an_unknown_key_of_an_optional_section_is_refused() -> None:
    with pytest.raises(
        RecipeError,
        match=r"unknown key in data\.long_tail 'nmax'; known: .* Did you mean 'n_max'\?",
    ):
        with_values(data__long_tail={"n_max": 5, "imbalance_ratio": 2, "nmax": 1})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "methods.ce.strategy",
            "diverse-to-specifc",
            r"methods\.ce\.strategy: unknown strategy .* Did you mean 'diverse-to-specific'\?",
        ),
        (
            "methods.ce.strategy",
            ["fixed"],
            r"methods\.ce\.strategy: unknown strategy '\['fixed'\]'; known: adaptive, ",
        ),
        (
            "methods.ce.objective",
            "cross-entrpy",
            r"methods\.ce\.objective: unknown objective .* Did you mean 'cross-entropy'\?",
        ),
        (
            "train.model.architecture",
            "resnet11",
            r"train\.model\.architecture: unknown architecture .* Did you mean 'resnet",
        ),
        (
            "train.augment",
            ["flp"],
            r"train\.augment\.0: unknown augmentation 'flp'; known: .* Did you mean 'flip'\?",
        ),
        (
            "data.format",
            "imagefoldr",
            r"data\.format: unknown format 'imagefoldr'; .* Did you mean 'imagefolder'\?",
        ),
        (
            "spectrum.encoding",
            "jpg",
            r"value of spectrum\.encoding 'jpg'; known: jpeg, png, .* Did you mean 'jpeg'\?",
        ),
        ("baseline", "cee", r"^unknown baseline 'cee'; known: ce\. Did you mean 'ce'\?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(
    key: str, value: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(REQUIRED, {key: value})


def test_an_unknown_recipe_is_refused_with_the_nearest_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        RecipeError,
        match=r"^unknown recipe 'fashion-tl'\. .* 'fashion-lt'\? `discl recipes` ",
    ):
        load_recipe("fashion-tl")
    with pytest.raises(
        RecipeError,
        match=r"there is no recipe file \S*mine\.yaml\. `discl recipes` lists all that ship\.$",
    ):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "birds.yaml").write_text("extends: fashion-lt\n")
    for name in ("brids.yaml", "birds"):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(RecipeError, match=r"Did you mean 'birds\.yaml'\?"):
            load_recipe(name)
    with pytest.raises(
        RecipeError, match=r"Did you mean 'inaturalist2018-ce-discl' or '\S+'( or '\S+')?\?"
    ):
        load_recipe(tmp_path / "inaturalist-ce-discl.yaml")


def test_a_run_folder_is_no_recipe_but_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipes(tmp_path / "run", recipe=REQUIRED)
    monkeypatch.chdir(tmp_path)
    for named in ("run", tmp_path / "run", Path("../") / tmp_path.name / "run"):
        with pytest.raises(
            RecipeError,
            match=r"run is a run folder, .* \S*run/recipe\.yaml; .* add --out \S*run\.",
        ):
            load_recipe(named)


def test_extends_misspelt_is_all_that_is_told(tmp_path: Path) -> None:
    write_recipes(tmp_path, mine={"extend": "base.yaml", "train": {"epochs": 5}})
    with pytest.raises(RecipeError) as raised:
        load_recipe(tmp_path / "mine.yaml")
    told = str(raised.value)
    assert told.startswith("unknown key in the recipe 'extend'; known: ") and told.endswith(
        ". Did you mean 'extends'?"
    )
    assert ", extends, " in told and "\n" not in told


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "spectrum.seeds",
            "many",
            r"spectrum\.seeds: input should be a whole number; got 'many'\.",
        ),
        ("spectrum.seeds", True, r"spectrum\.seeds: got the truth value True"),
        (
            "spectrum.seeds",
            0,
            r"spectrum\.seeds: input should be greater than or equal to 1; got 0\.",
        ),
        ("spectrum.levels", 30, r"spectrum\.levels: input should be a list; got 30\."),
        ("spectrum.levels", [], r"spectrum\.levels: list should have at least 1 item"),
        (
            "spectrum.levels",
            [0.3],
            r"spectrum\.levels\.0: level 0\.3 is not a whole per cent .* Write λ = 0\.3 as 30\.",
        ),
        ("spectrum.levels", [10, 10], r"^spectrum\.levels names a level twice: \[10, 10\]\."),
        ("spectrum.levels", [100], r"spectrum\.levels: level 100 is the real image"),
        (
            "spectrum.levels",
            [99],
            r"spectrum\.levels: level 99 % leaves t\(λ\) = 0 .* use at least 100 steps",
        ),
        (
            "spectrum.guidance_scale",
            0.5,
            r"spectrum\.guidance_scale: input should be greater than or equal to 1",
        ),
        (
            "train.optimizer.lr",
            float("nan"),
            r"train\.optimizer\.lr: input should be a finite number",
        ),
        (
            "train.optimizer.lr",
            float("inf"),
            r"train\.optimizer\.lr: input should be a finite number",
        ),
        (
            "train.model",
            "resnet10",
            r"train\.model: input should be a mapping, .*; got 'resnet10'\.",
        ),
        (
            "train.curriculum_epochs",
            66,
            r"^train\.curriculum_epochs = 66 exceeds train\.epochs = 65",
        ),
        (
            "data.own_split",
            {"validation": 0.5, "test": 0.5},
            r"data\.own_split: validation \+ test = 1 leaves no image for training",
        ),
        (
            "data.long_tail",
            {"n_max": 5},
            r"data\.long_tail\.imbalance_ratio: this key is required\.",
        ),
        ("groups", {"many": 10, "few": 20}, r"^groups\.few = 20 is greater than groups\.many = 10"),
        (
            "prompts.templates",
            ["a photo"],
            r"prompts\.templates\.0: template 'a photo' lacks \{class\}",
        ),
        (
            "prompts.endpoint",
            {
                "url": "http://h/v1",
                "model": "m",
                "parameters": {"top_p": 1, "since": date(2020, 1, 1)},
            },
            r"prompts\.endpoint\.parameters: 'since' cannot be sent as JSON \(.* date .*\); ",
        ),
        (
            "prompts.endpoint",
            {"url": "http://h/v1", "model": "m", "parameters": {"stop": [{"at": float("nan")}]}},
            r"prompts\.endpoint\.parameters: 'stop' cannot be sent as JSON \(Out of range float",
        ),
        (
            "prompts.endpoint",
            {"url": "http://[::1/v1", "model": "m"},
            r"prompts\.endpoint\.url: 'http://\[::1/v1' is no base URL",
        ),
        ("filter.template", "a photo", r"filter\.template: template 'a photo' lacks \{class\}"),
        (
            "filter.threshold",
            30,
            r"filter\.threshold: input should be less than or equal to 1; got 30\.",
        ),
        (
            "filter.level_thresholds",
            {0: True},
            r"filter\.level_thresholds: got the truth value True",
        ),
        ("train.crop_scale", [0.5, True], r"train\.crop_scale: got the truth value True"),
        ("train.model.light", {"width": 1.5}, r"^train\.model\.light\.width: got 1\.5; write .*$"),
        (
            "loop",
            {"rounds": 2, "policy": ["a"]},
            r"^loop\.policy: a policy is a name, or .*\['a'\]",
        ),
        ("filter.band", [0.1], r"^filter\.band: item 2 is missing; got \[0\.1\]\.$"),
        (
            "filter.level_thresholds",
            {"9" * 5000: 0.1},
            r"^filter\.level_thresholds\.9+…9+: level '9+…9+' is not a whole per cent",
        ),
        ("methods", {}, r"methods: dictionary should have at least 1 item"),
        ("methods", {"a/b": {}}, r"methods\.a/b: string should match pattern"),
        ("name", "../elsewhere", r"name: string should match pattern"),
        ("name", None, r"name: input should be a text; got None\."),
    ],
)
def test_wrong_values_are_refused_with_place_and_value(key: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(REQUIRED, {key: value})


def test_parameters_of_an_endpoint_may_be_all_that_json_has() -> None:
    parameters = yaml.safe_load(
        "{temperature: 0.5, stop: [a, null], logit_bias: {50256: -100}, "
        "since: '2020-01-01', x: {y: true}}"
    )
    asked = with_values(
        prompts__endpoint={"url": "http://h/v1", "model": "m", "parameters": parameters}
    ).prompts.endpoint
    assert asked is not None
    assert asked.parameters == parameters


def test_truth_values_are_taken_where_they_are_meant() -> None:
    recipe = with_values(train__optimizer__nesterov=True, methods__ce__undersample=False)
    assert recipe.train.optimizer.nesterov is True
    assert recipe.methods["ce"].undersample is False


def test_all_problems_are_told_at_once_one_line_each() -> None:
    tree = {
        **REQUIRED,
        "data": {"rot": "images"},
        "spectrum": {"checkpoint": "x", "levels": [0.3, 101, 50]},
        "train": {"epochs": 0, "augment": ["flp"]},
        "methods": {"a": {"strategy": "fixed"}, "b": {"strategy": "adaptief"}},
    }
    with pytest.raises(RecipeError) as raised:
        validate(tree)
    places = [
        "data.root: this key is required.",
        "unknown key in data 'rot'",
        "spectrum.levels.0: level 0.3 is not a whole per cent",
        "spectrum.levels.1: level 101 is not a whole per cent",
        "train.epochs: input should be greater than or equal to 1; got 0.",
        "train.augment.0: unknown augmentation 'flp'",
        "methods.a: strategy 'fixed' and the key 'level' go together",
        "methods.b.strategy: unknown strategy 'adaptief'",
    ]
    lines = str(raised.value).splitlines()
    assert [line[: len(place)] for line, place in zip(lines, places, strict=True)] == places


@pytest.mark.parametrize(
    "method", [{"strategy": "fixed"}, {"strategy": "all-levels", "level": 50}, {"level": 50}]
)
def test_fixed_and_level_go_together(method: dict[str, Any]) -> None:
    with pytest.raises(
        RecipeError,
        match=r"methods\.one: strategy 'fixed' and the key 'level' go together, for example",
    ):
        with_values(methods={"one": method})


def test_methods_need_their_levels_in_the_spectrum() -> None:
    with pytest.raises(
        RecipeError,
        match=r"methods\.one trains on level 0 %, .*spectrum\.levels; add 0",
    ):
        with_values(spectrum__levels=[30], methods={"one": {"strategy": "text-only"}})
    with pytest.raises(
        RecipeError,
        match=r"methods\.one trains on level 10 %, .*spectrum\.levels; add 10",
    ):
        with_values(methods={"one": {"strategy": "fixed", "level": 10}})
    assert (
        with_values(methods={"one": {"strategy": "fixed", "level": 100}}).methods["one"].level
        == REAL
    )


def test_too_few_curriculum_epochs_are_told_before_any_image_is_made() -> None:
    with pytest.raises(
        RecipeError,
        match=r"^train\.curriculum_epochs: got 1, too short .* 2 levels",
    ):
        with_values(
            train__curriculum_epochs=1, methods={"one": {"strategy": "diverse-to-specific"}}
        )


@pytest.mark.parametrize(
    ("order", "result"),
    [(None, None), (7, 7), (["b", "a"], ["b", "a"]), ([1, 0], ["1", "0"])],
    ids=["as is", "seed", "names", "digits"],
)
def test_class_orders(order: Any, result: Any) -> None:
    recipe = with_values(data__long_tail={"n_max": 5, "imbalance_ratio": 2, "class_order": order})
    assert recipe.data.long_tail is not None
    assert recipe.data.long_tail.class_order == result


@pytest.mark.parametrize("order", ["shuffled", True, 0.5])
def test_a_class_order_of_another_kind_is_refused_in_one_line(order: Any) -> None:
    with pytest.raises(RecipeError, match=r"^data\.long_tail\.class_order: [^\n]*$"):
        with_values(data__long_tail={"n_max": 5, "imbalance_ratio": 2, "class_order": order})


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("train.epochs=5", ("train.epochs", 5)),
        ("spectrum.levels=[0, 30]", ("spectrum.levels", [0, 30])),
        (" data.root =a=b", ("data.root", "a=b")),
        ("train.resize=null", ("train.resize", None)),
        ("train.resize=", ("train.resize", None)),
        (
            "methods.one={strategy: fixed, level: 50}",
            ("methods.one", {"strategy": "fixed", "level": 50}),
        ),
    ],
)
def test_overrides_are_read_as_yaml(text: str, pair: tuple[str, Any]) -> None:
    assert parse_override(text) == pair


@pytest.mark.parametrize("text", ["train.epochs", "=5", "  =5", ""])
def test_an_override_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(
        RecipeError, match=r"--set takes key=value, for example --set train\.epochs=5; got"
    ):
        parse_override(text)


def test_an_override_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"--set spectrum\.levels: '\[0' is not valid YAML"):
        parse_override("spectrum.levels=[0")


def test_overrides_are_laid_over_and_change_nothing_else() -> None:
    base = load_recipe("fashion-lt")
    changed = load_recipe(
        "fashion-lt",
        {
            "train.epochs": 61,
            "train.optimizer.lr": "1e-4",
            "methods.half": {"strategy": "fixed", "level": 50},
        },
    )
    assert changed.train.epochs == 61
    assert changed.train.optimizer.lr == 1e-4  # YAML reads 1e-4 as a text
    assert list(changed.methods) == [*base.methods, "half"]
    assert changed.spectrum == base.spectrum
    with pytest.raises(RecipeError, match=r"--set name\.first: 'first'"):
        load_recipe("fashion-lt", {"name.first": 1})


def test_an_override_leaves_the_given_tree_alone() -> None:
    tree = {**REQUIRED, "train": {"epochs": 70}}
    assert load_recipe(tree, {"train.epochs": 80}).train.epochs == 80
    assert tree["train"] == {"epochs": 70}


def test_relative_paths_are_looked_up_beside_the_file_then_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, working = tmp_path / "recipes", tmp_path / "work"
    for folder in (beside / "images", beside / "clip", working / "images", working / "diffusion"):
        folder.mkdir(parents=True)
    (beside / "phrases.yaml").write_text("{}")
    tree = {
        **REQUIRED,
        "prompts": {"phrases": "phrases.yaml"},
        "spectrum": {"checkpoint": "diffusion", "levels": [0]},
        "filter": {"checkpoint": "clip"},
    }
    (beside / "mine.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(working)
    recipe = load_recipe(beside / "mine.yaml")
    assert recipe.data.root == str(beside / "images")
    assert recipe.prompts.phrases == str(beside / "phrases.yaml")
    assert recipe.filter.checkpoint == str(beside / "clip")
    assert recipe.spectrum.checkpoint == str(working / "diffusion")
    assert load_recipe("../recipes/mine.yaml") == recipe


def test_names_of_the_hub_and_embedded_ones_stay_as_they_are() -> None:
    recipe = with_values(filter__checkpoint="embedded:fashion-mnist/clip")
    assert (recipe.filter.checkpoint, recipe.spectrum.checkpoint) == (
        "embedded:fashion-mnist/clip",
        "owner/diffusion",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [", "is not valid YAML"),
        (b"\xff\xfe\x00name", "is not valid YAML"),
        (b"", "holds no recipe: a mapping of keys is expected at its top"),
        (b"- 1", "holds no recipe: a mapping of keys is expected at its top"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def write_recipes(folder: Path, **trees: Any) -> Path:
    """YAML files of these names; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tree in trees.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder


def test_a_recipe_is_laid_over_the_one_it_extends(tmp_path: Path) -> None:
    write_recipes(
        tmp_path,
        base={
            **REQUIRED,
            "name": "base",
            "train": {"batch_size": 8, "optimizer": {"lr": 0.5, "momentum": 0.1}},
            "methods": {"ce": {}, "x": {}},
        },
        mine={
            "extends": "base.yaml",
            "spectrum": {"levels": [10]},
            "train": {"optimizer": {"lr": 0.25}},
            "methods": {"x": None, "discl": {"strategy": "diverse-to-specific"}},
        },
    )  # fmt: skip
    recipe = load_recipe(tmp_path / "mine.yaml", {"train.epochs": 70})
    assert recipe.name == "mine"  # never the base's
    assert list(recipe.spectrum.levels) == [10]  # a list is replaced
    assert recipe.spectrum.checkpoint == "owner/diffusion"
    assert (
        recipe.train.batch_size,
        recipe.train.optimizer.lr,
        recipe.train.optimizer.momentum,
        recipe.train.epochs,
    ) == (8, 0.25, 0.1, 70)
    assert list(recipe.methods) == ["ce", "discl"]  # a null takes out what the base says
    assert "extends" not in recipe.plain()
    flat = tmp_path / "flat.yaml"
    flat.write_text(recipe.to_yaml())
    assert load_recipe(flat) == recipe


def test_bases_may_have_bases_and_be_several_and_shipped(tmp_path: Path) -> None:
    write_recipes(
        tmp_path / "shared",
        deep={"extends": "fashion-lt", "train": {"batch_size": 7, "seed": 3}},
        small={"train": {"seed": 4, "image_size": 16}},
    )
    write_recipes(
        tmp_path,
        mine={
            "name": "other",
            "extends": ["shared/deep.yaml", "shared/small.yaml"],
            "hard": {"fewer_than": 9},
        },
    )
    recipe = load_recipe(tmp_path / "mine.yaml")
    shipped = load_recipe("fashion-lt")
    assert recipe.name == "other"
    assert (
        recipe.train.batch_size,
        recipe.train.seed,
        recipe.train.image_size,
        recipe.hard.fewer_than,
    ) == (7, 4, 16, 9)
    assert recipe.spectrum == shipped.spectrum
    assert load_recipe({"name": "plain", "extends": "fashion-lt"}).train == shipped.train


def test_a_path_is_looked_up_beside_the_file_that_states_it(tmp_path: Path) -> None:
    (tmp_path / "shared" / "images").mkdir(parents=True)
    (tmp_path / "clip").mkdir()
    (tmp_path / "images").mkdir()
    write_recipes(tmp_path / "shared", base=REQUIRED)
    write_recipes(tmp_path, mine={"extends": "shared/base.yaml", "filter": {"checkpoint": "clip"}})
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.data.root == str(tmp_path / "shared" / "images")
    assert recipe.filter.checkpoint == str(tmp_path / "clip")


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        (
            "fashion-tl",
            r"mine\.yaml extends 'fashion-tl': unknown recipe .* Did you mean 'fashion-lt'\?",
        ),
        ("base.yaml", r"mine\.yaml extends 'base\.yaml': there is no recipe file .*base\.yaml"),
        ("other.yaml", r"extend one another in a circle: mine\.yaml -> other\.yaml -> mine\.yaml"),
        ("mine.yaml", r"extend one another in a circle: mine\.yaml -> mine\.yaml"),
        (
            7,
            r"^extends: the name of a shipped recipe or the path of a YAML file .*; got 7\.",
        ),
        ([["a"]], r"^extends: the name of a shipped recipe"),
    ],
)
def test_a_base_that_cannot_be_extended_is_refused(
    tmp_path: Path, extends: Any, message: str
) -> None:
    write_recipes(tmp_path, mine={**REQUIRED, "extends": extends}, other={"extends": "mine.yaml"})
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "mine.yaml")


def test_two_files_may_share_a_base(tmp_path: Path) -> None:
    write_recipes(
        tmp_path,
        base=REQUIRED,
        left={"extends": "base.yaml"},
        right={"extends": "base.yaml"},
        mine={"extends": ["left.yaml", "right.yaml"]},
    )
    assert load_recipe(tmp_path / "mine.yaml").name == "mine"


CLIP = {"architecture": "clip", "checkpoint": "owner/clip"}


@pytest.mark.parametrize(
    ("train", "method", "message"),
    [
        (
            {},
            {"objective": "flyp"},
            r"methods\.one: objective flyp needs a CLIP, .* resnet10; set train\.model",
        ),
        ({}, {"fine_tune": "zero-shot"}, r"methods\.one: fine_tune: zero-shot needs a CLIP"),
        (
            {},
            {"fine_tune": "lp-ft"},
            r"methods\.one: fine_tune: lp-ft needs a pretrained network, but resnet10 ",
        ),
        (
            {"model": CLIP},
            {"objective": "flyp", "fine_tune": "linear-probe"},
            r"objective flyp trains both towers; use fine_tune: full",
        ),
        (
            {"mixup": 0.2},
            {"system": "docl"},
            r"system docl .* mixup and cutmix",
        ),
        (
            {"model": CLIP, "mixup": 0.2},
            {"objective": "flyp"},
            r"mixup and cutmix .* objective flyp",
        ),
        (
            {"model": CLIP},
            {"fine_tune": "zero-shot", "strategy": "all-levels"},
            r"zero-shot trains on nothing; remove strategy",
        ),
        ({"model": {**CLIP, "templates": []}}, {}, r"train\.model\.templates"),
        ({"model": {**CLIP, "templates": ["a photo"]}}, {}, r"lacks \{class\}"),
        (
            {"model": {"architecture": "clip"}},
            {},
            r"architecture clip takes its network from a checkpoint; name one in train\.model",
        ),
        (
            {"model": {"checkpoint": "owner/clip"}},
            {},
            r"architecture resnet10 is built from scratch; remove checkpoint",
        ),
        (
            {"model": {**CLIP, "pretrained": False}},
            {},
            r"architecture clip needs pretrained weights",
        ),
        (
            {"model": {**CLIP, "head": "cosine"}},
            {},
            r"head: cosine and width .* architecture clip",
        ),
        ({}, {"objective": "ldam"}, r"objective ldam and head: cosine go together"),
        ({}, {"fine_tune": "light"}, r"fine_tune: light needs a pretrained network, but resnet10"),
        (
            {"model": CLIP},
            {"objective": "flyp", "fine_tune": "light"},
            r"objective flyp trains both towers; use fine_tune: full instead of light",
        ),
        (
            {"model": CLIP},
            {"fine_tune": "light", "system": "ldmlr"},
            r"system ldmlr trains a linear head again, .* cosine; set it to linear",
        ),
        (
            {"model": {**CLIP, "light": {"width": 0}}},
            {"fine_tune": "light"},
            r"train\.model\.light\.width.*got 0; write a whole number from 1 to 4096, or auto",
        ),
        (
            {"model": {**CLIP, "light": {"adapter": "none", "width": 2}}},
            {"fine_tune": "light"},
            r"width \(got 2\) is of adapters, and adapter is none",
        ),
        (
            {"model": {**CLIP, "light": {"head": "linear", "scale": 10}}},
            {"fine_tune": "light"},
            r"scale \(got 10\) is of a cosine head",
        ),
        (
            {
                "model": {
                    "architecture": "transformers",
                    "checkpoint": "owner/vit",
                    "light": {"initial_head": "texts"},
                }
            },
            {"fine_tune": "light"},
            r"initial_head: texts needs a CLIP, because architecture transformers",
        ),
        (
            {},
            {"objective": {"name": "focal", "gama": 2}},
            r"unknown parameter of objective focal 'gama'; known: gamma",
        ),
        (
            {},
            {"train": {"optimizer": {"lr": -1}}},
            r"methods\.one\.train\.optimizer\.lr: input should be greater than 0",
        ),
        ({}, {"train": {"epoch": 5}}, r"methods\.one\.train 'epoch'; .* Did you mean 'epochs'"),
        (
            {"batch_size": 10, "accumulate": 4},
            {},
            r"train\.batch_size = 10 cannot be divided evenly into accumulate = 4 parts",
        ),
        ({"crop_scale": [1.0, 0.9]}, {}, r"train\.crop_scale = \[1\.0, 0\.9\]"),
        (
            {"epochs": 5, "curriculum_epochs": 5},
            {"finish": {"epochs": 5}},
            r"methods\.one\.finish\.epochs = 5 leaves none of the 5 epochs before them",
        ),
        (
            {"epochs": 5, "curriculum_epochs": 5, "model": CLIP},
            {"finish": {"epochs": 4, "head_only": True}, "fine_tune": "lp-ft"},
            r"lp-ft needs at least two epochs before those of finish\.epochs = 4; got 1",
        ),
        ({}, {"finish": {"epochs": 5, "new_head": True}}, r"finish\.new_head is for .* head_only"),
        ({}, {"finish": {"epochs": 5, "lr": 0.1}}, r"finish\.lr is for epochs that train the head"),
        (
            {"model": CLIP},
            {"finish": {"epochs": 5, "head_only": True}, "objective": "flyp"},
            r"methods\.one\.finish: objective flyp rebuilds the head .*; remove head_only",
        ),
        (
            {"model": CLIP},
            {"finish": {"epochs": 5}, "fine_tune": "zero-shot"},
            r"zero-shot trains on nothing; remove finish",
        ),
        (
            {"model": CLIP},
            {"tau_normalisation": 0.5, "objective": "flyp"},
            r"methods\.one\.tau_normalisation = 0\.5 changes nothing: objective flyp rebuilds",
        ),
        (
            {},
            {"synthetic_weight": [1, 0.5, 0], "strategy": "all-levels"},
            r"methods\.one\.synthetic_weight.* got \[1, 0\.5, 0\]; write a number from 0 to 100",
        ),
        ({}, {"synthetic_weight": -1}, r"synthetic_weight.* got -1; write a number"),
        (
            {},
            {"synthetic_weight": 0.5},
            r"weighs synthetic images, and strategy real-only has none",
        ),
    ],
)
def test_objectives_and_networks_that_do_not_go_together(
    train: dict[str, Any], method: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        validate({**REQUIRED, "train": train, "methods": {"one": method}})


def test_a_finish_ends_the_curriculum_and_defaults_are_not_written() -> None:
    methods: dict[str, Any] = {
        "one": {"strategy": "all-levels", "synthetic_weight": [1, 0.5], "finish": {"epochs": 8}},
        "two": {"strategy": "all-levels"},
    }
    recipe = validate({**REQUIRED, "methods": methods})
    assert [recipe.training(name).curriculum_epochs for name in methods] == [57, 60]
    assert recipe.plain()["methods"]["one"]["synthetic_weight"] == [1.0, 0.5]
    later = {"finish", "synthetic_weight", "tau_normalisation"}
    assert not later & recipe.plain()["methods"]["two"].keys()
    assert "tau_normalisation" not in recipe.plain()["evaluate"]
    assert validate(recipe.plain()) == recipe


def test_a_method_lays_its_own_training_over_the_shared_one() -> None:
    recipe = validate(
        {
            **REQUIRED,
            "train": {"epochs": 70, "optimizer": {"name": "sgd", "lr": 0.1}},
            "methods": {
                "plain": {},
                "tuned": {
                    "objective": {"name": "focal", "gamma": 1},
                    "train": {"optimizer": {"lr": 0.5}, "model": {"width": 8}},
                },
            },
        }
    )
    assert recipe.training("plain") is recipe.train
    tuned = recipe.training("tuned")
    assert (tuned.optimizer.name, tuned.optimizer.lr, tuned.model.width, tuned.epochs) == (
        "sgd",
        0.5,
        8,
        70,
    )
    assert recipe.methods["tuned"].loss.parameters == {"gamma": 1.0}
    assert validate(recipe.plain()) == recipe
