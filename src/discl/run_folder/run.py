"""`Run`: a recipe and its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from ..data import (
    Cameras,
    ImageTable,
    class_groups,
    digest_image,
    keep_aspect,
    read_tables,
    through_cameras,
    without_empty_classes,
)
from ..data.depth import depth_of
from ..errors import CheckpointError, RunError, arguments_named
from ..recipe import Data, Recipe
from ..spectrum.models import Address, Generator, describe_generator, describe_loras
from ..spectrum.plan import PlanShard, Sampling
from ..spectrum.store import Shards, score_shards, spectrum_shards
from ..utils.stored import read_recipe_tree, read_table
from . import paths
from .changes import changed_values
from .former import FOLDER, former_recipe, let_go
from .locks import lock


@dataclass(frozen=True)
class Run:
    """A recipe and its folder, as `open_run` returns them.

    - `recipe`: the recipe.
    - `folder`: the run folder.
    - `overrides`: files and folders of another run to use instead.
    - `allow_plugins`: whether stages may import code that the recipe names as `module:attribute`.

    ```python
    import discl

    run = discl.open_run("runs/fashion-lt/recipe.yaml", "runs/fashion-lt")
    print(run.train.class_counts, len(run.spectrum.ids()))
    ```
    """

    recipe: Recipe
    folder: Path
    overrides: Mapping[str, Path] = field(default_factory=dict)
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
        return self.overrides.get(name, self.folder / name)

    def location(self, name: str) -> Path | str:
        """Where shards of a kind lie: in the run folder, or under `runtime.store`."""
        store = self.recipe.runtime.store
        return self.path(name) if store is None else f"{store.rstrip('/')}/{name}"

    @cached_property
    def tables(self) -> dict[str, ImageTable]:
        """`{split: table}` as `data.parquet` lists them."""
        listed = read_table(self.path(paths.DATA)).to_pandas()
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
                    f"the images or labels of '{data.root}' are no longer those of {self.path(paths.DATA)}; "
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
                f"image '{name}' has changed since it was checked; delete {paths.DATA} and {paths.HARD} in {self.folder}."
            )
        return image

    @cached_property
    def generator(self) -> Generator:
        """What the recipe's checkpoint is."""
        with arguments_named(config="spectrum.config"):
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
        """ImageCache a side of what is made. Raises CheckpointError where neither the recipe nor the checkpoint tells."""
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
        if found.max_side is not None and max(wide, high) > found.max_side:
            raise CheckpointError(
                f"a picture of {width} × {height} pixels would become {wide} × {high}, and this generator makes at most {found.max_side} a "
                f"side; set spectrum.size to {found.max_side // 2} or less, or spectrum.resize: square."
            )
        return wide, high

    @contextmanager
    def lock(self, stage: str, shard: PlanShard | None = None) -> Iterator[None]:
        """Keeps other processes that work in this folder from the same stage, or waits for them.

        Stages exclude each other; generation excludes only what would make the same images: another shard of the same division goes on
        beside it. Raises RunError where another process has changed the folder's recipe meanwhile.
        """
        what = f"{stage} {shard}" if shard else stage
        with lock(self.folder, what, lambda other: stages_clash(what, other)):
            kept = self.folder / paths.RECIPE
            if kept.exists() and changed_values(read_recipe_tree(kept), self.recipe):
                raise RunError(
                    f"another process has changed the recipe of {self.folder} meanwhile; run the command again."
                )
            yield

    @property
    def amended(self) -> bool:
        """Whether the command of before the amendment would still take the folder back; see `open_run`."""
        return former_recipe(self.path(FOLDER)) is not None

    def commit(self) -> None:
        """Called before the first image, classifier or figure of the recipe is made: the one before it can no longer be taken back."""
        let_go(self.path(FOLDER))

    @property
    def spectrum(self) -> Shards:
        return spectrum_shards(self.location(paths.SPECTRUM), self.train.class_names)

    @property
    def scores(self) -> Shards:
        return score_shards(self.location(paths.SCORES))

    @property
    def groups(self) -> dict[str, list[int]]:
        """Labels of many / medium / few by the real training images."""
        return class_groups(
            self.train.class_counts.tolist(), self.recipe.groups.many, self.recipe.groups.few
        )


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


def stages_clash(mine: str, other: str) -> bool:
    """Whether two stages may not work in one folder at once; see `Run.lock`."""
    (stage, *shard), (other_stage, *other_shard) = mine.split(), other.split()
    if "generate" not in (stage, other_stage):
        return True
    if stage != other_stage:
        return False
    number, _, of = (shard or ["1/1"])[0].partition("/")
    other_number, _, other_of = (other_shard or ["1/1"])[0].partition("/")
    return of != other_of or number == other_number
