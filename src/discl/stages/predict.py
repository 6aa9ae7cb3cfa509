"""`discl predict`: a trained classifier on new images."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor

from ..data import Gate, Unreadable, decode_image, to_square
from ..data.depth import Depth, Ranges, depth_of
from ..data.gate import roots_of
from ..data.listing import LeftOut, known_suffixes, walk_images
from ..errors import DataError, RecipeError, RunError, unknown
from ..escaping import for_csv, one_line
from ..evaluation.metrics import softmax_rows
from ..models.classifier import ClassifierConfig, load_classifier
from ..run_folder.paths import RECIPE, TRAIN, WEIGHTS
from ..training.inference import logits_of, side_of_crops
from ..utils.atomic import whole
from ..utils.counts import count_be
from ..utils.logging import get_logger
from ..utils.yaml_text import read_yaml

logger = get_logger(__name__)

BATCH = 256
SHOWN = 20
UNREADABLE = ("skip", "error")


def find_classifier(run: Path, method: str | None = None) -> Path:
    """The folder of a classifier.

    - `run`: a run folder, or the folder of a classifier, which is returned.
    - `method`: default the recipe's last one.

    Only the order of the methods is read from the recipe; nothing that it names is imported.
    """
    if (run / WEIGHTS).exists():
        return run
    found = sorted((run / TRAIN).glob(f"*/{WEIGHTS}"))
    order = _methods_of(run / RECIPE)
    trained = {each.parent.name: each.parent for each in found}
    trained = {name: trained[name] for name in order if name in trained}
    if not trained:
        raise RunError(
            f"{run} holds no trained classifier; expected {run / TRAIN}/METHOD/{WEIGHTS}. Run "
            "`discl train` first."
        )
    if method is not None and method not in trained:
        raise RunError(unknown("method", method, trained))
    return trained[method] if method is not None else list(trained.values())[-1]


def _methods_of(recipe: Path) -> list[str]:
    """Names of the methods in a recipe file; none if it is unreadable. Nothing is imported."""
    try:
        tree = read_yaml(recipe)
    except RecipeError:
        return []
    methods = tree.get("methods") if isinstance(tree, dict) else None
    return [str(name) for name in methods] if isinstance(methods, dict) else []


def predict(
    run: Path | str,
    images: Path | str,
    out: Path | str,
    method: str | None = None,
    device: str = "cpu",
    on_progress: Callable[[int], None] = lambda count: None,
    unreadable: str = "skip",
    base: Path | str | None = None,
    crops: int = 1,
) -> Path:
    """Writes the predictions of a trained classifier as CSV and returns the path.

    Columns are `image`, `prediction`, `probability` and one probability per class. The file is
    written atomically and batch by batch, so any number of images fits into memory. A path or class
    that starts like a spreadsheet formula, such as `=1`, gets an apostrophe.

    - `run`: a run folder, or the folder of a classifier.
    - `images`: an image, or a folder that is searched. Hidden files, other file types and linked
      folders are left out, and counted in a message.
    - `out`: the CSV file to write.
    - `method`: which method of the run; default its last one.
    - `device`: for example `cpu` or `cuda`.
    - `on_progress`: called with the number of images of each batch.
    - `unreadable`: `skip` leaves out unreadable images and names them; `error` stops at the first.
    - `base`: the checkpoint under a classifier with `fine_tune: light`, if it has moved.
    - `crops`: 5 for the mean over five crops, as with `evaluate.test_time_crops: 5`.

    Raises DataError where no image is found or readable. Raises RunError for an unknown device,
    method or value, and where `out` cannot be written.

    ```python
    import discl

    discl.predict("runs/fashion-lt", "photos", "predictions.csv")
    ```
    """
    where, target = Path(images), Path(out)
    if unreadable not in UNREADABLE:
        raise RunError(unknown("value of unreadable", unreadable, UNREADABLE))
    if crops not in (1, 5):
        raise RunError(f"crops is 1 (the centre) or 5 (with the corners); got {crops}.")
    if not where.exists():
        raise DataError(f"'{where}' does not exist; name an image or a folder of images.")
    if not _device_exists(device):
        raise RunError(f"this machine has no device '{device}'; use --device cpu.")
    with _table(target) as stream:  # first, so that an unwritable file stops before the work
        model, config = load_classifier(find_classifier(Path(run), method), base)
        writer = csv.writer(stream)
        writer.writerow(["image", "prediction", "probability", *map(for_csv, config.class_names)])
        search = _Search(where, config, side_of_crops(config, crops))
        model = model.to(device)
        for names, squares in search.batches(unreadable):
            logits = logits_of(model, squares, config, device=device, crops=crops)
            rows = zip(names, softmax_rows(logits).numpy(), strict=True)
            writer.writerows(_row(name, row, config.class_names) for name, row in rows)
            on_progress(len(names))
        search.report()
    return target


class _Search:
    """Decodes the images of a file or folder batch by batch, and records what is left out."""

    def __init__(self, where: Path, config: ClassifierConfig, size: int) -> None:
        self.where, self.size = where, size
        self.folder = (where if where.is_dir() else where.resolve().parent).absolute()
        self.gate = Gate(roots_of(self.folder))
        self.left_out, self.broken, self.read = LeftOut(), list[str](), 0
        self.depth = Depth() if config.depth is None else depth_of(config.depth)
        self.knows_depth, self.wide = config.depth is not None, Ranges()

    def batches(self, unreadable: str) -> Iterator[tuple[list[str], Tensor]]:
        """(paths, uint8 `[batch, 3, size, size]`) of the readable images. Raises DataError."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            paths = self._paths()
            while some := list(islice(paths, BATCH)):
                names, squares = [], []
                for path, square in zip(some, threads.map(self._square, some), strict=True):
                    if isinstance(square, Unreadable):
                        self._refuse(path, square, unreadable)
                    else:
                        names.append(path)
                        squares.append(torch.from_numpy(square).permute(2, 0, 1).contiguous())
                self.read += len(names)
                if names:
                    yield names, torch.stack(squares)

    def report(self) -> None:
        """Logs what was left out. Raises DataError where no image was read."""
        what = f"; left out: {self.left_out}" if self.left_out else ""
        if not self.read and not self.broken:
            raise DataError(
                f"'{self.where}' holds no image (none ends in {known_suffixes()}){what}."
            )
        listing = "\n".join(f"  {one_line(problem)}" for problem in self.broken[:SHOWN])
        if not self.read:
            raise DataError(f"no image of '{self.where}' can be read:\n{listing}")
        if self.broken:
            skipped = count_be(len(self.broken), "unreadable image")
            logger.warning(f"{skipped} skipped:\n{listing}")
        if self.wide.counts:
            rule = (
                "the rule of training"
                if self.knows_depth
                else "the usual rule, because training had none"
            )
            logger.info(f"{self.wide.describe(self.depth)} ({rule})")
        if self.left_out:
            logger.warning(f"left out of {str(self.where)!r}: {self.left_out}")

    def _paths(self) -> Iterator[str]:
        if not self.where.is_dir():
            return iter([str(self.where)])
        return (str(Path(path)) for path in walk_images(self.where, self.left_out))

    def _square(self, path: str) -> np.ndarray | Unreadable:
        whole_path = str(Path(path).resolve() if path == str(self.where) else Path(path).absolute())
        try:
            stored = {"bytes": None, "path": whole_path}
            picture = decode_image(stored, self.gate, self.depth, self.wide.add)
            return to_square(picture, self.size)
        except Unreadable as error:
            return error

    def _refuse(self, path: str, error: Unreadable, unreadable: str) -> None:
        problem = f"{path!r}: {error}"
        if unreadable == "error":
            raise DataError(
                f"image {problem}. Fix or delete it, or skip such images with --unreadable skip."
            )
        self.broken.append(problem)


def _row(name: str, probabilities: np.ndarray, class_names: Sequence[str]) -> list[str]:
    best = int(probabilities.argmax())
    values = (f"{value:.6f}" for value in probabilities)
    return [for_csv(name), for_csv(class_names[best]), f"{probabilities[best]:.6f}", *values]


@contextmanager
def _table(target: Path) -> Iterator[TextIO]:
    """A CSV file that is written atomically. Raises RunError where it cannot be written."""
    try:
        if target.is_dir():
            raise IsADirectoryError("it is a folder; name a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            whole(target) as unfinished,
            unfinished.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
        ):
            yield stream
    except OSError as error:
        raise RunError(
            f"the predictions cannot be written to {target}: {error}. Choose another file with "
            "--out, or free space."
        ) from error


def _device_exists(device: str) -> bool:
    try:
        return torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError):
        return False
