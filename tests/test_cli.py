"""The command line: help with examples, short errors, recipes for own images, late imports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.main import get_command

from discl import cli
from discl.cli import command
from discl.errors import DataError
from discl.evaluation.controls import find_control
from discl.levels import check_level
from discl.recipe import load_recipe, shipped_recipes
from discl.run_folder.run import read_data
from discl.stages.init import write_starter

COMMANDS = sorted(get_command(cli.app).commands)  # type: ignore[attr-defined]


@pytest.fixture
def discl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`discl("recipes")` -> (exit status, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["discl", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, *capsys.readouterr()

    return call


def write_images(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(
                root / name / f"{number}.png"
            )
    return root


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh process has loaded after `code`."""
    heavy = ["torch", "diffusers", "transformers", "datasets", "pandas", "pyarrow", "PIL", "numpy"]
    end = f"import sys; print(*[name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{end}"], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


def test_importing_discl_loads_nothing_heavy() -> None:
    assert loaded_by("import discl; discl.check_level(30); discl.DisclError") == set()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from discl import cli; sys.argv = ['discl', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass"
    )
    assert loaded_by(code) == set()


def test_names_of_the_package_are_fetched_when_they_are_used() -> None:
    import discl

    assert discl.check_level is check_level
    assert discl.load_recipe is load_recipe
    assert all(getattr(discl, name) is not None for name in discl.__all__)
    with pytest.raises(AttributeError, match="module 'discl' has no attribute 'lode_recipe'"):
        _ = discl.lode_recipe


def test_help_names_every_command_and_shows_examples(discl) -> None:
    status, out, _ = discl("--help")
    assert status == 0
    assert "discl init photos/birds" in out
    assert all(re.search(rf"^│ {name} +[A-Z]", out, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_shows_an_example(discl, command: str) -> None:
    status, out, _ = discl(command, "--help")
    assert status == 0
    assert f"discl {command}" in out.split("Usage:")[1].split("\n", 1)[1]


def test_recipes_are_listed(discl) -> None:
    status, out, _ = discl("recipes")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == shipped_recipes()
    assert all(
        len(line.split(maxsplit=1)[1]) > 20 for line in out.splitlines()
    )  # one line of the header
    assert re.search(
        r"^fashion-lt +The embedded example: Fashion-MNIST as a long tail", out, re.MULTILINE
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "fashion-tl"],
            "error: unknown recipe 'fashion-tl'. A recipe file's name ends in .yaml. "
            "Did you mean 'fashion-lt'? ",
        ),
        (
            ["train", "fashion-lt", "--set", "train.epoch=5"],
            "error: unknown key in train 'epoch'; known: ",
        ),
        (
            ["plan", "fashion-lt", "--set", "methods.discl.strategy=diverse"],
            "error: methods.discl.strategy: unknown strategy 'diverse'; ",
        ),
        (
            ["hard", "fashion-lt", "--set", "train.epochs"],
            "error: --set takes key=value, for example --set train.epochs=5; got",
        ),
        (
            ["filter", "fashion-lt", "--set", "filter.threshold=2"],
            "error: filter.threshold: input should be less than or equal to 1; got 2.",
        ),
        (
            ["generate", "nowhere/mine.yaml"],
            "error: there is no recipe file nowhere/mine.yaml. ",
        ),
        (
            ["predict", "nowhere", "nothing.png", "--out", "x.csv"],
            "error: 'nothing.png' does not exist; name ",
        ),
    ],
)
def test_a_mistake_ends_with_status_1_and_one_short_paragraph(
    discl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, error = discl(*arguments)
    assert (status, out) == (1, "")
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_not_there_is_told_with_what_should_be(
    discl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, error = discl("init", "nowhere")
    assert (status, out) == (1, "")
    assert error.startswith("error: data.root: 'nowhere' does not exist; looked for ")
    assert (
        all(f"\n  {layout}:\n" in error for layout in ("imagefolder", "parquet", "manifest"))
        and "hub" in error
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_installed_command_prints_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "discl.cli", "run", "fashion-tl"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: unknown recipe 'fashion-tl'. ")
    assert done.stderr.count("\n") == 1


def test_an_interruption_tells_how_to_go_on(discl, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("discl.cli.program.app", interrupt)
    assert discl("run", "fashion-lt") == (
        130,
        "",
        "stopped; run the same command again to continue\n",
    )


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("birds", "birds"),
        ("my birds (2024)", "my-birds-2024"),
        ("Vögel im Gärten", "V-gel-im-G-rten"),
        ("鳥", "my-data"),
        ("_it's: {odd} #1", "it-s-odd-1"),
    ],
)
def test_init_writes_a_recipe_that_loads(
    discl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str
) -> None:
    write_images(tmp_path / folder, wren=3, owl=40)
    monkeypatch.chdir(tmp_path)
    assert discl("init", folder) == (0, f"{name}.yaml\n", "")
    recipe = load_recipe(tmp_path / f"{name}.yaml")
    assert (recipe.name, recipe.data.root) == (name, str(tmp_path / folder))
    assert (
        recipe.groups.many,
        recipe.groups.few,
        recipe.hard.fewer_than,
        recipe.train.batch_size,
    ) == (100, 20, 20, 21)
    controls, spectrum = (
        ["ce", "ce-undersampled", "ce-balanced"],
        ["fixed", "discl", "discl-balanced"],
    )
    assert list(recipe.methods) == controls + spectrum
    methods = recipe.plain()["methods"]
    for rule in (True, False):  # hard.rule tail or probability
        assert find_control(methods, "discl", by_tail=rule) == "ce-undersampled"
        assert find_control(methods, "fixed", by_tail=rule) == "ce-undersampled"
        assert find_control(methods, "discl-balanced", by_tail=rule) == "ce-balanced"
    header = (tmp_path / f"{name}.yaml").read_text().splitlines()[0]
    assert header.endswith(": 43 images in 2 classes (3 to 40 a class).")


def test_init_never_overwrites(discl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "birds", wren=1, owl=1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "birds.yaml").write_text("mine")
    assert discl("init", "birds") == (
        1,
        "",
        "error: birds.yaml exists already; name another file with --out.\n",
    )
    assert (tmp_path / "birds.yaml").read_text() == "mine"
    assert discl("init", "birds", "--out", "new folder/other.yaml") == (
        0,
        "new folder/other.yaml\n",
        "",
    )
    assert (
        "# discl plan 'new folder/other.yaml' "
        in (tmp_path / "new folder" / "other.yaml").read_text()
    )


def test_the_tail_of_a_starter_holds_at_least_the_smallest_class(tmp_path: Path) -> None:
    write_images(tmp_path / "data", a=25, b=30)
    recipe = load_recipe(write_starter(tmp_path / "data", tmp_path / "r.yaml"))
    assert (recipe.groups.many, recipe.groups.few, recipe.hard.fewer_than) == (100, 26, 26)
    with pytest.raises(DataError, match=r"r\.yaml exists already"):
        write_starter(tmp_path / "data", tmp_path / "r.yaml")


def write_list(root: Path, name: str, heading: str) -> None:
    """A list of the images below the root: path, path, class, class, one for each heading."""
    separator = "\t" if name.endswith(".tsv") else ","
    lines = []
    for image in sorted(root.rglob("*.png")):
        path, label = image.relative_to(root).as_posix(), image.parent.name
        lines.append(
            separator.join((path, path, label) if heading.count(separator) == 2 else (path, label))
        )
    (root / name).write_text("\n".join((heading, *lines)) + "\n")


@pytest.mark.parametrize(
    ("name", "heading", "columns"),
    [
        ("labels.csv", "path,label", {}),
        ("labels.csv", "path,file,label", {}),
        ("labels.csv", "filename,class", {"image": "filename", "label": "class"}),
        ("labels.tsv", "image\tCategory", {"image": "image", "label": "Category"}),
        ("labels.csv", "File_Name,label", {"image": "File_Name"}),
    ],
)
def test_init_takes_a_list(
    discl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    heading: str,
    columns: dict[str, str],
) -> None:
    write_list(write_images(tmp_path / "set", wren=3, owl=4), name, heading)
    monkeypatch.chdir(tmp_path)
    assert discl("init", f"set/{name}") == (0, "labels.yaml\n", "")
    recipe = load_recipe("labels.yaml")
    assert (recipe.name, recipe.data.root, recipe.data.columns) == (
        "labels",
        str(tmp_path / "set" / name),
        columns,
    )
    assert {split: len(table) for split, table in read_data(recipe.data).items()} == {"train": 7}


def test_init_asks_for_the_columns_and_the_folder_of_a_list(
    discl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_list(write_images(tmp_path / "set", wren=3, owl=4), "two.csv", "file,image,species")
    (tmp_path / "set" / "two.csv").rename(tmp_path / "two.csv")
    monkeypatch.chdir(tmp_path)
    status, _, error = discl("init", "two.csv")
    assert (
        status == 1
        and "file and image may both be the paths of the images." in error
        and "discl init two.csv --column im" in error
    )
    status, _, error = discl("init", "two.csv", "--column", "image=file")
    assert (
        status == 1
        and "none of file, image, species has a usual name for the classes" in error
        and "--column label=NAME" in error
    )
    columns = ("--column", "image=file", "--column", "label=species")
    status, _, error = discl("init", "two.csv", *columns)
    assert status == 1 and "name the folder of the images with --images" in error
    assert discl("init", "two.csv", *columns, "--images", "set") == (0, "two.yaml\n", "")
    recipe = load_recipe("two.yaml")
    assert (recipe.data.columns, recipe.data.images) == (
        {"image": "file", "label": "species"},
        str(tmp_path / "set"),
    )
    assert read_data(recipe.data)["train"].root == tmp_path / "set"
    assert discl("init", "set", "--column", "species")[2].startswith(
        "error: --column takes ours=theirs"
    )
    assert discl("init", "set", "--column", "labels=x")[2].startswith(
        "error: unknown column 'labels'; known: "
    )


def test_what_a_starter_offers_instead_is_valid(tmp_path: Path) -> None:
    """Every key in its own comment replaces the one above it, and the recipe loads."""
    write_images(tmp_path / "data", a=25, b=30)
    path = write_starter(tmp_path / "data", tmp_path / "r.yaml")
    section, offered = "", []
    for line in path.read_text().splitlines():
        section = line.partition(":")[0] if re.match(r"[a-z]", line) else section
        if found := re.match(r"  # ([a-z-]+): +\S", line):
            offered.append(
                (
                    f"{section}.{found[1]}",
                    yaml.safe_load(line.replace("# ", "", 1).strip())[found[1]],
                )
            )
    clip = next(
        value for key, value in offered if key == "train.model" and value["architecture"] == "clip"
    )
    for key, value in offered:
        needed = {"train.model": clip} if key.startswith("methods.") else {}
        assert load_recipe(path, {key: value} | needed)
    names = [
        name
        for key, value in offered
        for name in (value if isinstance(value, dict) else {key: value}).values()
    ]
    assert {
        "timm",
        "transformers",
        "clip",
        "flyp",
        "black-forest-labs/FLUX.1-dev",
        "zero-shot",
    } <= {*map(str, names)}


def test_a_small_set_gets_enough_updates(tmp_path: Path) -> None:
    for name, count, steps in (("small", 20, 31), ("large", 6000, None)):
        table = write_images(tmp_path / name, a=2, b=2) / "list.csv"
        table.write_text(
            "\n".join(
                (
                    "path,label,id",
                    *(f"{'ab'[n % 2]}/{n % 2}.png,{'ab'[n % 2]},{n}" for n in range(count)),
                )
            )
            + "\n"
        )
        train = load_recipe(write_starter(table, tmp_path / f"{name}.yaml")).train
        assert train.steps_per_epoch == steps
        assert train.epochs * (steps or 0.7 * count / train.batch_size) >= 2000


@pytest.mark.parametrize(("gpu", "dtype"), [(True, "float16"), (False, "float32")])
def test_the_dtype_of_a_starter_is_that_of_the_device(
    gpu: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    write_images(tmp_path / "data", a=2, b=2)
    assert (
        load_recipe(write_starter(tmp_path / "data", tmp_path / "r.yaml")).spectrum.dtype == dtype
    )


def test_what_is_hard_is_told_again(discl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "data", a=9, b=60)
    monkeypatch.chdir(tmp_path)
    write_starter(Path("data"))
    told = [
        discl("hard", "data.yaml", "--set", "data.own_split={validation: 0, test: 0.2}")
        for _ in range(2)
    ]
    for status, out, error in told:
        assert (status, out) == (0, "runs/data/hard.parquet\n")
        assert ("\n" + error).endswith(
            "\n9 of 57 training images are hard (a 9 of 9)\n"
        ) and error.count("are hard") == 1


def test_options_reach_the_run(discl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from discl.run_folder import run as run_module

    opened: list[run_module.Run] = []
    monkeypatch.setattr(
        "discl.pipeline.run_until",
        lambda run, stage: opened.append(run) or Path(stage),
    )
    out = str(tmp_path / "run")
    overrides = ["--set", "train.epochs=70", "--set", "spectrum.levels=[0, 50]"]
    assert discl("hard", "fashion-lt", "--out", out, *overrides) == (0, "hard\n", "")
    assert (opened[0].folder, opened[0].recipe.train.epochs) == (tmp_path / "run", 70)
    assert opened[0].recipe.spectrum.levels == [0, 50]
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["spectrum"]["levels"] == [
        0,
        50,
    ]
    status, _, error = discl("hard", "fashion-lt", "--out", out)
    assert status == 1
    assert "  spectrum.levels: [0, 50] -> [0, 10, 30, 50]\n  train.epochs: 70 -> 36\n" in error
    assert discl("train", "fashion-lt", "--out", out, "--amend") == (0, "train\n", "")
    assert opened[1].recipe == load_recipe("fashion-lt")


def test_what_is_stopped_says_how_to_go_on(discl, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.RunOptions, "open", stop)
    status, _, told = discl("generate", "fashion-lt")
    assert status == 130 and "run the same command again" in told
