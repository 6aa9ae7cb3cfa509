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
    read_archive,
    read_tables,
    without_empty_classes,
)
from ..data.depth import depth_of
from ..errors import CheckpointError, RunError, arguments_named
from ..recipe import Data, Recipe
from ..spectrum.low_rank import AdapterFiles, read_adapter
from ..spectrum.models import (
    Address,
    Generator,
    describe_class_tokens,
    describe_generator,
    describe_loras,
)
from ..spectrum.plan import PlanShard, Sampling
from ..spectrum.store import Shards, score_shards, spectrum_shards
from ..utils.logging import get_logger
from ..utils.stored import read_recipe_tree, read_table
from . import paths
from .changes import changed_values
from .locks import lock

logger = get_logger(__name__)


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
        """The recipe's device; for `auto` a GPU if there is one."""
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
        """Path of a file or folder of the run, by its name in `run_folder.paths`."""
        return self.overrides.get(name, self.folder / name)

    def location(self, name: str) -> Path | str:
        """Folder or address of shards: in the run folder, or under `runtime.store`."""
        store = self.recipe.runtime.store
        return self.path(name) if store is None else f"{store.rstrip('/')}/{name}"

    @cached_property
    def tables(self) -> dict[str, ImageTable]:
        """`{split: table}` as `data.parquet` lists them.

        Raises RunError if the images or labels are no longer those that it lists.
        """
        listed = read_table(self.path(paths.DATA)).to_pandas()
        data = self.recipe.data
        sources = read_data(data)
        if "depth" in listed and len(listed):
            depth = depth_of(listed["depth"].iloc[0])
            sources = {split: replace(table, depth=depth) for split, table in sources.items()}
        result = {}
        for name, rows in listed.groupby("split", sort=False):
            source = sources.get(rows["source_split"].iloc[0])
            if source is not None and 0 <= rows["row"].min() <= rows["row"].max() < len(source):
                result[str(name)] = source.select(rows["row"])
            table = result.get(str(name))
            if (
                table is None
                or table.ids != rows["id"].tolist()
                or table.labels.tolist() != rows["label"].tolist()
            ):
                raise RunError(
                    f"the images or labels of '{data.root}' are no longer those of "
                    f"{self.path(paths.DATA)}; start a new folder with --out."
                )
        return result

    @cached_property
    def archive(self) -> ImageTable:
        """The images of `retrieval.archive`, without labels.

        Raises RunError if the recipe names none, DataError if it is missing, broken or empty.
        """
        config = self.recipe.retrieval
        if config is None:
            raise RunError("the recipe names no archive; add a section retrieval: {archive: …}.")
        keys = {"root": "archive", "kind": "format", "columns": "columns", "images": "images"}
        with arguments_named(**{name: f"retrieval.{key}" for name, key in keys.items()}):
            return read_archive(
                config.archive,
                config.format,
                columns=config.columns,
                images=config.images,
                on_left_out=logger.warning,
            )

    @property
    def train(self) -> ImageTable:
        """The real training images."""
        return self.tables["train"]

    def checked_image(self, row: int, content: str, split: str = "train") -> Image.Image:
        """Decoded RGB picture of a real image.

        - `row`: its row in the split.
        - `content`: its digest when it was checked.

        Raises RunError if it has another digest now.
        """
        image = self.tables[split].image(row)
        if digest_image(image) != content:
            name = self.tables[split].ids[row]
            raise RunError(
                f"image '{name}' has changed since it was checked; "
                f"delete {paths.DATA} and {paths.HARD} in {self.folder}."
            )
        return image

    @cached_property
    def generator(self) -> Generator:
        """Describes the recipe's checkpoint."""
        with arguments_named("spectrum.checkpoint", config="spectrum.config"):
            return describe_generator(self.base_address)

    @property
    def base_address(self) -> Address:
        """Files and folders of the generator, without what `spectrum.adapt` trains."""
        spectrum = self.recipe.spectrum
        loras = tuple((lora.path, lora.scale) for lora in spectrum.loras)
        return Address(spectrum.checkpoint, spectrum.config, loras)

    @property
    def address(self) -> Address:
        """Files and folders of the generator, with what `discl adapt` trained.

        Raises RunError if the recipe has `spectrum.adapt` and they are not trained yet.
        """
        base = self.base_address
        if self.recipe.spectrum.adapt is None:
            return base
        weights, tokens = self.adapter
        loras = base.loras if weights is None else (*base.loras, (str(weights), 1.0))
        return replace(base, loras=loras, class_tokens=None if tokens is None else str(tokens))

    @property
    def adapter(self) -> AdapterFiles:
        """The low-rank weights and class tokens that `discl adapt` trained.

        Raises RunError if they are not trained yet.
        """
        pointer = self.path(paths.ADAPTER)
        if not pointer.is_file():
            raise RunError(
                f"{self.folder} has no adapted generator yet; run `discl adapt RECIPE --out "
                f"{self.folder}` first."
            )
        return read_adapter(pointer, self.path(paths.ADAPTED))

    @cached_property
    def sampling(self) -> Sampling:
        """What determines the pixels of the spectrum besides the requests."""
        return self._sampling(self.address)

    @cached_property
    def base_sampling(self) -> Sampling:
        """The same without what `spectrum.adapt` trains."""
        return self._sampling(self.base_address)

    def _sampling(self, address: Address) -> Sampling:
        spectrum = self.recipe.spectrum
        return Sampling(
            self.generator.model,
            self.generator.scheduler,
            spectrum.num_inference_steps,
            spectrum.guidance_scale,
            self.size,
            spectrum.dtype,
            spectrum.encoding,
            spectrum.resize,
            spectrum.steps,
            *spectrum.guidance_interval,
            describe_loras(address.loras),
            spectrum.sampler,
            spectrum.timestep_spacing or "",
            describe_class_tokens(address.class_tokens),
        )

    @property
    def size(self) -> int:
        """Pixels a side of synthetic images.

        Raises CheckpointError if neither the recipe nor the checkpoint states it.
        """
        size = self.recipe.spectrum.size or self.generator.size
        if size is None:
            raise CheckpointError(
                f"checkpoint '{self.recipe.spectrum.checkpoint}' does not state the size of its "
                "pictures; set spectrum.size."
            )
        return size

    def made_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the synthetic images of a source of this size.

        Raises CheckpointError if they are larger than the generator can make.
        """
        size, generator = self.size, self.generator
        if self.recipe.spectrum.resize == "square":
            return size, size
        wide, high = keep_aspect(width, height, size, generator.multiple)
        if generator.max_side is not None and max(wide, high) > generator.max_side:
            raise CheckpointError(
                f"a picture of {width} × {height} pixels would become {wide} × {high}, and this "
                f"generator makes at most {generator.max_side} a side; set spectrum.size to "
                f"{generator.max_side // 2} or less, or spectrum.resize: square."
            )
        return wide, high

    @contextmanager
    def lock(self, stage: str, shard: PlanShard | None = None) -> Iterator[None]:
        """Waits for other processes in this folder, then keeps them from stages that clash.

        Stages exclude each other. Generation excludes only what would make the same images, so
        another shard of the same division goes on beside it.

        Raises RunError if another process has changed the folder's recipe.
        """
        what = f"{stage} {shard}" if shard else stage
        with lock(self.folder, what, lambda other: stages_clash(what, other)):
            kept = self.folder / paths.RECIPE
            if (
                kept.exists()
                and not self._is_written(kept)
                and changed_values(read_recipe_tree(kept), self.recipe)
            ):
                raise RunError(
                    f"another process has changed the recipe of {self.folder}; "
                    "run the command again."
                )
            yield

    @cached_property
    def _written(self) -> bytes:
        """The recipe as `open_run` writes it."""
        return self.recipe.to_yaml().encode()

    def _is_written(self, kept: Path) -> bool:
        """Whether a file is this recipe byte for byte, which takes less time than to parse it."""
        try:
            return kept.is_file() and kept.read_bytes() == self._written
        except OSError:
            return False

    @property
    def spectrum(self) -> Shards:
        """The store of synthetic images."""
        return spectrum_shards(self.location(paths.SPECTRUM), self.train.class_names)

    @property
    def scores(self) -> Shards:
        """The store of CLIP similarities."""
        return score_shards(self.location(paths.SCORES))

    @property
    def groups(self) -> dict[str, list[int]]:
        """Labels of many / medium / few by the real training images."""
        return class_groups(
            self.train.class_counts.tolist(), self.recipe.groups.many, self.recipe.groups.few
        )


KEYS = {name: name for name in ("root", "columns", "splits", "files", "images", "cameras")}
KEYS["kind"] = "format"
"""Keys of the section `data`, by the arguments of `read_tables`."""


def read_data(
    data: Data,
    on_unused: Callable[[list[str]], None] = lambda splits: None,
    on_left_out: Callable[[str], None] = lambda message: None,
) -> dict[str, ImageTable]:
    """`{split: table}` of the section `data`, before any long tail or own split.

    - `on_unused`: called with the splits that are not used.
    - `on_left_out`: called with a message about what is left out.

    Raises as `read_tables` does.
    """
    with arguments_named(**{name: f"data.{key}" for name, key in KEYS.items()}):
        tables = read_tables(
            data.root,
            data.format,
            columns=data.columns,
            splits=data.splits,
            files=data.files,
            images=data.images,
            cameras=Cameras(**dict(data.cameras)) if data.cameras else None,
            on_unused=on_unused,
            on_left_out=on_left_out,
        )
        if data.drop_empty_classes:
            tables, dropped = without_empty_classes(tables)
            if dropped:
                on_left_out(dropped)
    return tables


def stages_clash(what: str, other: str) -> bool:
    """Whether two stages, such as `train` or `generate 1/2`, exclude each other; see `Run.lock`."""
    (stage, *shard), (other_stage, *other_shard) = what.split(), other.split()
    if "generate" not in (stage, other_stage):
        return True
    if stage != other_stage:
        return False
    number, _, count = (shard or ["1/1"])[0].partition("/")
    other_number, _, other_count = (other_shard or ["1/1"])[0].partition("/")
    return count != other_count or number == other_number
