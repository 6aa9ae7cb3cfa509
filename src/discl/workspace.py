"""A run folder: a recipe, and the files in which its stages leave what they made."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from .checkpoints import checkpoint_digest
from .console import say
from .data import (
    Cameras,
    ImageTable,
    class_groups,
    digest_image,
    keep_aspect,
    read_tables,
    through_cameras,
    without_empty_classes,
)
from .data.depth import depth_of
from .data.gate import CLOSED, first_foreign
from .errors import (
    BrokenFileError,
    CheckpointError,
    RecipeError,
    RunError,
    StoreError,
    WriteError,
    shorten,
)
from .files import clear_unfinished
from .former import FOLDER, bring_back, former_recipe, let_go, set_aside
from .locks import lock
from .recipe import Data, Recipe, load_recipe
from .spectrum.cache import mapped_rows
from .spectrum.models import Address, Generator, describe_generator, describe_loras
from .spectrum.plan import Sampling, Share
from .spectrum.store import Shards, score_shards, spectrum_shards
from .stored import AGAIN, read_json, read_recipe_tree, read_table, write_text

STALE = {
    "data": ("data", "hard", "plan"),
    "hard": ("hard", "plan"),
    "prompts": ("plan",),
    "spectrum": ("plan",),
}
"""Which tables a changed section of the recipe makes stale; images and scores are keyed by content and never are."""
NOT_FOR_JUDGES = ("train.epochs", "train.curriculum_epochs", "train.select")
"""What the classifiers that find hard images do not take from the section train."""


@dataclass(frozen=True)
class Run:
    """A recipe and the folder in which it is carried out; `borrowed` names files and folders that are another run's.

    `allow_plugins` is the leave to import what the recipe names as `module:attribute`; stages that train use it.
    """

    recipe: Recipe
    folder: Path
    borrowed: Mapping[str, Path] = field(default_factory=dict)
    allow_plugins: bool = False

    @property
    def device(self) -> torch.device:
        name = self.recipe.runtime.device
        if name == "auto":
            name = (
                "cuda"
                if torch.cuda.is_available()
                else "mps"
                if torch.backends.mps.is_available()
                else "cpu"
            )
        return torch.device(name)

    def path(self, name: str) -> Path:
        return self.borrowed.get(name, self.folder / name)

    def place(self, name: str) -> Path | str:
        """Where shards of a kind lie: in the run folder, or under `runtime.store`."""
        store = self.recipe.runtime.store
        return self.path(name) if store is None else f"{store.rstrip('/')}/{name}"

    @cached_property
    def tables(self) -> dict[str, ImageTable]:
        """`{split: table}` as `data.parquet` lists them."""
        listed = read_table(self.path("data.parquet")).to_pandas()
        data = self.recipe.data
        found = read_data(data)
        if "depth" in listed and len(listed):
            depth = depth_of(listed["depth"].iloc[0])
            found = {split: replace(table, depth=depth) for split, table in found.items()}
        result = {}
        for name, rows in listed.groupby("split", sort=False):
            source = found.get(rows["source_split"].iloc[0])
            if source is not None and 0 <= rows["row"].min() <= rows["row"].max() < len(source):
                result[str(name)] = source.select(rows["row"])
            table = result.get(str(name))
            if (
                table is None
                or table.ids != rows["id"].tolist()
                or table.labels.tolist() != rows["label"].tolist()
            ):
                raise RunError(
                    f"the images or labels of '{data.root}' are no longer those of {self.path('data.parquet')}; "
                    "start a new folder with --out."
                )
        return result

    @property
    def train(self) -> ImageTable:
        return self.tables["train"]

    def checked_image(self, row: int, content: str) -> Image.Image:
        """Decoded RGB picture of a training image. Raises RunError where its digest is not `content`, which it was when it was checked."""
        image = self.train.image(row)
        if digest_image(image) != content:
            name = self.train.ids[row]
            raise RunError(
                f"image '{name}' has changed since it was checked; delete data.parquet and hard.parquet in {self.folder}."
            )
        return image

    @cached_property
    def generator(self) -> Generator:
        """What the recipe's checkpoint is."""
        return describe_generator(self.address)

    @property
    def address(self) -> Address:
        """Where the generator lies."""
        asked = self.recipe.spectrum
        return Address(
            asked.checkpoint, asked.config, tuple((lora.path, lora.scale) for lora in asked.loras)
        )

    @cached_property
    def sampling(self) -> Sampling:
        """What determines the pixels of the spectrum besides the requests."""
        asked = self.recipe.spectrum
        found = self.generator
        return Sampling(
            found.model,
            found.scheduler,
            asked.num_inference_steps,
            asked.guidance_scale,
            self.size,
            asked.dtype,
            asked.encoding,
            asked.resize,
            asked.steps,
            *asked.guidance_interval,
            describe_loras(self.address.loras),
        )

    @property
    def size(self) -> int:
        """Pixels a side of what is made. Raises CheckpointError where neither the recipe nor the checkpoint tells."""
        size = self.recipe.spectrum.size or self.generator.size
        if size is None:
            named = self.recipe.spectrum.checkpoint
            raise CheckpointError(
                f"checkpoint '{named}' does not tell how large its pictures are; set spectrum.size."
            )
        return size

    def made_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of what is made of a source of this size. Raises CheckpointError for more than the generator has places for."""
        size, found = self.sampling.size, self.generator
        if self.sampling.resize == "square":
            return size, size
        wide, high = keep_aspect(width, height, size, found.multiple)
        if found.most is not None and max(wide, high) > found.most:
            raise CheckpointError(
                f"a picture of {width} × {height} pixels would become {wide} × {high}, and this generator makes at most {found.most} a "
                f"side; set spectrum.size to {found.most // 2} or less, or spectrum.resize: square."
            )
        return wide, high

    @contextmanager
    def turn(self, stage: str, share: Share | None = None) -> Iterator[None]:
        """Keeps other processes that work in this folder from the same stage, or waits for them.

        Stages exclude each other; generation excludes only what would make the same images: another share of the same division goes on
        beside it. Raises RunError where another process has changed the folder's recipe meanwhile.
        """
        what = f"{stage} {share}" if share else stage
        with lock(self.folder, what, lambda other: _clash(what, other)):
            kept = self.folder / "recipe.yaml"
            if kept.exists() and _changes(read_recipe_tree(kept), self.recipe):
                raise RunError(
                    f"another process has changed the recipe of {self.folder} meanwhile; run the command again."
                )
            yield

    @property
    def amended(self) -> bool:
        """Whether the command of before the amendment would still take the folder back; see `open_run`."""
        return former_recipe(self.path(FOLDER)) is not None

    def settle(self) -> None:
        """Called before the first image, classifier or figure of the recipe is made: the one before it can no longer be taken back."""
        let_go(self.path(FOLDER))

    @property
    def spectrum(self) -> Shards:
        return spectrum_shards(self.place("spectrum"), self.train.class_names)

    @property
    def scores(self) -> Shards:
        return score_shards(self.place("scores"))

    @property
    def groups(self) -> dict[str, list[int]]:
        """Labels of many / medium / few by the real training images."""
        return class_groups(
            self.train.class_counts.tolist(), self.recipe.groups.many, self.recipe.groups.few
        )


def open_run(
    recipe: Recipe | str | Path | dict[str, Any],
    folder: Path | str | None = None,
    amend: bool = False,
    check: Callable[[Run], None] = lambda run: None,
    *,
    allow_plugins: bool = False,
) -> Run:
    """The run of a recipe (an object, or whatever `load_recipe` takes) in `folder` (default `runs/NAME`), made where it does not exist.

    A folder that was made with another recipe is refused with RunError that lists the differences. With `amend` the new
    recipe takes its place: images and scores that still fit are kept, tables and classifiers that do not are made anew.
    `runtime` may always differ, and a checkpoint may have been copied elsewhere.

    With `allow_plugins` the stages that train may import what this recipe, never the folder's own, names as
    `module:attribute`; nothing of it is imported here.

    An amendment that is refused costs nothing. `check` may raise before anything is changed. What only a stage finds out comes later, so
    recipe, tables and pages of before are first copied to `former/` and stay there until `Run.settle`, which is called before the new
    recipe makes an image, a classifier or a figure; until then the former recipe needs no `amend` and gets all of it back. Whatever is
    discarded goes before the recipe that it does not fit is written, and what fits comes after it: a kill leaves no table beside
    another's recipe, and the same command again does the rest.
    """
    recipe = load_recipe(recipe)
    folder = Path(folder) if folder is not None else Path("runs") / recipe.name
    changed = _changed_keys(recipe, folder, amend)
    if changed and not _is_former(recipe, folder):
        check(Run(recipe, folder, allow_plugins=allow_plugins))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if changed is None or changed or _is_former(recipe, folder):
            with lock(folder, "open", lambda other: _clash("open", other)):
                _take_over(recipe, folder, amend)
        else:
            _keep(recipe, folder)
        clear_unfinished(folder)
    except WriteError:
        raise
    except OSError as error:
        raise RunError(f"cannot write to the run folder {folder}: {error}.") from error
    if recipe.runtime.threads:
        torch.set_num_threads(recipe.runtime.threads)
    return Run(recipe, folder, allow_plugins=allow_plugins)


def read_data(
    data: Data,
    on_unused: Callable[[list[str]], None] = lambda splits: None,
    on_left_out: Callable[[str], None] = lambda told: None,
) -> dict[str, ImageTable]:
    """`{split: table}` of what the section `data` names, before any long tail or split of our own; raises as `read_tables` does.

    `on_left_out` is told of the classes that `drop_empty_classes` takes out.
    """
    tables = read_tables(
        data.root,
        data.format,
        data.columns,
        data.splits,
        data.files,
        on_unused,
        data.images,
        on_left_out,
    )
    if data.cameras:
        tables = through_cameras(tables, Cameras(**dict(data.cameras)))
    if data.drop_empty_classes:
        tables, told = without_empty_classes(tables)
        if told:
            on_left_out(told)
    return tables


def _changed_keys(recipe: Recipe, folder: Path, amend: bool) -> list[str] | None:
    """Keys of the folder's recipe that have another value in this one; None for a folder that is no run yet.

    Raises RunError for what is no run folder and, without `amend`, for another recipe, unless it is the former one of an amendment.
    """
    kept = folder / "recipe.yaml"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; name a folder with --out.")
    if not kept.exists():
        written = (kept.name, f".{kept.name}.")  # the second while it is being written
        foreign = folder.exists() and [
            each
            for each in folder.iterdir()
            if each.name != "locks" and not each.name.startswith(written)
        ]
        if foreign and not kept.exists() and not (_is_ours(folder) and amend):
            remedy = " or, if it was one, go on in it with --amend" if _is_ours(folder) else ""
            raise RunError(
                f"{folder} is not empty and holds no recipe.yaml, so it is no run folder; choose another with --out{remedy}."
            )
        if not foreign:
            return None
    try:
        old = read_recipe_tree(kept)
    except BrokenFileError as error:
        if not _is_ours(folder):
            raise RunError(
                f"{kept} holds no recipe, so {folder} is no run folder; choose another with --out."
            ) from error
        if not amend:
            raise
        old = {}  # so everything differs, and whatever does not fit the new recipe goes
    changed = _changes(old, recipe)
    if changed and not amend and not _is_former(recipe, folder):
        lines = "\n".join(
            f"  {key}: {shorten(before, 120)} -> {shorten(after, 120)}"
            for key, before, after in changed[:12]
        )
        lines += f"\n  … and {len(changed) - 12} more" if len(changed) > 12 else ""
        raise RunError(
            f"{folder} was made with another recipe:\n{lines}\nChoose another folder with --out, or go on in this one with --amend "
            "(images that still fit are kept, what they no longer fit is made anew)."
        )
    return [key for key, _, _ in changed]


def _is_ours(folder: Path) -> bool:
    """Whether a folder without a recipe that can be read has been a run's."""
    return any((folder / name).exists() for name in ("environment.json", "data.parquet", "train"))


def _is_former(recipe: Recipe, folder: Path) -> bool:
    """Whether a recipe is the one that the folder had before an amendment that has made nothing yet."""
    former = former_recipe(folder / FOLDER)
    return former is not None and not _changes(former, recipe)


def _take_over(recipe: Recipe, folder: Path, amend: bool) -> None:
    """Gives the folder this recipe; `open_run` says in which order and why."""
    kept, former = folder / "recipe.yaml", former_recipe(folder / FOLDER)
    if (
        former is not None
        and kept.exists()
        and not _compare(_completed(former), _completed(_tree_of(kept)))
    ):
        bring_back(
            folder
        )  # a kill has ended an amendment before it had begun, or a way back before it was at its end
    changed = _changed_keys(recipe, folder, amend)
    back = bool(changed) and _is_former(recipe, folder)
    if changed and not back and _tree_of(kept):
        set_aside(folder)
    _discard_stale(recipe, folder, changed or [])
    _keep(recipe, folder)
    if back:
        bring_back(folder)
        say(
            f"{folder} is back at its former recipe, with the tables and figures of then; the other recipe had made nothing yet"
        )


def _discard_stale(recipe: Recipe, folder: Path, changed: Sequence[str]) -> None:
    """Deletes the tables and pages that no longer fit the recipe."""
    for name in ("results.json", "report.html"):
        if changed:
            (folder / name).unlink(missing_ok=True)
    stale = {key.split(".")[0] for key in changed}
    if recipe.hard.rule == "probability" and any(
        key.startswith("train.") and key not in NOT_FOR_JUDGES for key in changed
    ):
        stale.add("hard")
    for section in stale:
        for name in STALE.get(section, ()):
            (folder / f"{name}.parquet").unlink(missing_ok=True)


def _keep(recipe: Recipe, folder: Path) -> None:
    kept, text = folder / "recipe.yaml", recipe.to_yaml()
    if not kept.is_file() or kept.read_bytes() != text.encode():
        write_text(kept, text)
    told = folder / "environment.json"
    try:
        if told.exists():
            read_json(told, "python", "packages")
            return
    except BrokenFileError as error:
        say(f"{str(error).removesuffix(f' {AGAIN}')} So it is written again.")
    write_text(told, json.dumps(_environment(), indent=2))


def _tree_of(kept: Path) -> dict[str, Any]:
    """The recipe that a folder keeps; nothing where it cannot be read."""
    try:
        return read_recipe_tree(kept)
    except BrokenFileError:
        return {}


def _changes(old: dict[str, Any], recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of what differs, `runtime` aside, and a checkpoint that only lies elsewhere."""
    return _compare(_completed(old), recipe.plain())


def _compare(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """As `_changes`, of two plain trees."""
    return [
        each
        for each in _differences({**old, "runtime": None}, {**new, "runtime": None})
        if not _only_moved(*each)
    ]


def _only_moved(key: str, before: Any, now: Any) -> bool:
    """Whether a key names a copy of the checkpoint that it named before."""
    if key.rpartition(".")[2] != "checkpoint" or not all(
        isinstance(each, str) and Path(each).is_dir() for each in (before, now)
    ):
        return False
    return checkpoint_digest(Path(before)) == checkpoint_digest(Path(now))


def _clash(mine: str, other: str) -> bool:
    """Whether two stages may not work in one folder at once; see `Run.turn`."""
    (stage, *share), (other_stage, *other_share) = mine.split(), other.split()
    if "generate" not in (stage, other_stage):
        return True
    if stage != other_stage:
        return False
    number, _, of = (share or ["1/1"])[0].partition("/")
    other_number, _, other_of = (other_share or ["1/1"])[0].partition("/")
    return of != other_of or number == other_number


def stored_images(run: Run, ids: Sequence[str]) -> Dataset:
    """`id` and undecoded `image` of these rows of the store, in this order, memory-mapped.

    Raises StoreError if one is not there, a shard is broken or holds a picture that has changed since it was made, or the disk has no
    room for them. The shards are copied once into one Arrow file in the run folder's `cache/`, which may be deleted at any time; so are
    those of a store elsewhere, as they are. A row that is there twice is taken once.
    """
    cache = run.path("cache")
    files = run.spectrum.local_files(cache / "shards")
    if not files:
        raise StoreError("the store holds no image yet; run `discl generate` first.")
    run.spectrum.check_pictures(files, cache / "checked.json")
    stored = mapped_rows(files, cache, ids, run.spectrum.ids)
    place = {name: row for row, name in enumerate(stored.select_columns("id")[:]["id"])}
    lacking = sum(name not in place for name in ids)
    if lacking:
        raise StoreError(
            f"the store lacks {lacking} of {len(ids)} images that the plan names; run `discl generate` first."
        )
    chosen = stored.select([place[name] for name in ids]).cast_column(
        "image", ImageFeature(decode=False)
    )
    if told := first_foreign(stored.data.column("image"), CLOSED):
        raise StoreError(
            f"the store {run.place('spectrum')} has an image without its bytes: {told}. Delete the shard that holds it."
        )
    return chosen


def _completed(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe that was written before some keys were there, with their defaults, which are what it meant; others as they are."""
    try:
        return load_recipe(tree).plain()
    except RecipeError:
        return tree


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            each
            for name in dict.fromkeys([*old, *new])
            for each in _differences(
                old.get(name), new.get(name), f"{key}.{name}" if key else str(name)
            )
        ]
    return [] if old == new else [(key, old, new)]


def _environment() -> dict[str, Any]:
    packages = (
        "discl",
        "torch",
        "diffusers",
        "transformers",
        "datasets",
        "pyarrow",
        "kornia",
        "numpy",
        "pillow",
    )
    return {
        "python": platform.python_version(), "platform": platform.platform(), "processor": platform.machine(),
        "threads": torch.get_num_threads(), "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: version(name) for name in packages},
    }  # fmt: skip
