"""Images in folders: one folder per class, or lists of "path label"."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...errors import DataError
from ..table import ImageTable
from .building import IMAGE_SUFFIXES, SPLIT_NAMES, Source, build_table, expected, full_paths, refuse_escape

LISTS = {"train": "ImageNet_LT_train.txt", "val": "ImageNet_LT_val.txt", "test": "ImageNet_LT_test.txt"}
NAME_FILES = ("LOC_synset_mapping.txt", "classnames.txt")


def read_image_folder(source: Source) -> dict[str, ImageTable]:
    """root/class/image or root/split/class/image; the classes of all splits together."""
    root, named_splits = source.path, set(source.splits.values())
    folders = subfolders(root) if root.is_dir() else []
    if not folders:
        raise DataError(f"data.root '{root}' has no sub-folders; expected root/class/image.jpg or root/train/class/image.jpg.")
    by_split = {folder.name: subfolders(folder) for folder in folders} if _are_splits(folders, named_splits) else {"train": folders}
    names = sorted({folder.name for class_folders in by_split.values() for folder in class_folders})
    label_of = {name: label for label, name in enumerate(names)}
    inside = len(str(root)) + 1
    tables = {}
    for split, class_folders in by_split.items():
        paths: list[str] = []
        labels: list[np.ndarray] = []
        for folder in class_folders:
            refuse_escape([folder], root)
            found = sorted(_images_below(str(folder), root))
            if not found:
                raise DataError(f"class '{folder.name}' has no images: none in {folder} ends in {', '.join(sorted(IMAGE_SUFFIXES))}.")
            paths += found
            labels.append(np.full(len(found), label_of[folder.name]))
        tables[split] = build_table(paths, np.concatenate(labels), names, [Path(path[inside:]).as_posix() for path in paths], root)
    return tables


def _images_below(folder: str, root: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.is_symlink():
                    refuse_escape([Path(entry.path)], root)
                yield from _images_below(entry.path, root)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122 (a Path per file would take most of the time)
                if entry.is_symlink():
                    refuse_escape([Path(entry.path)], root)
                yield entry.path


def _are_splits(folders: list[Path], named: set[str]) -> bool:
    """Whether the folders are splits rather than classes. Raises DataError where only some look like it."""
    known = {name for names in SPLIT_NAMES.values() for name in names}
    like_splits = [folder for folder in folders if folder.name in named or folder.name.lower() in known]
    others = [folder.name for folder in folders if folder not in like_splits]
    if others and like_splits and all(subfolders(folder) for folder in like_splits):
        raise DataError(
            f"{folders[0].parent} holds splits ({', '.join(folder.name for folder in like_splits)}) and other folders "
            f"({', '.join(others[:8])}); move those away, or name them in data.splits if they are splits."
        )
    return not others


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, hidden ones left out, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_lists(source: Source) -> dict[str, ImageTable]:
    """Split lists of "path label" over folders of images, as ImageNet-LT has them (arXiv 1904.05160).

    The lists lie at the root, or `data.files` names them: `{train: my_train.txt, test: my_test.txt}`. Class names come from
    `LOC_synset_mapping.txt` or `classnames.txt` (lines "folder name") at the root where one is there, else they are the folders' names.
    """
    files = source.files or {split: name for split, name in LISTS.items() if (source.path / name).is_file()}
    if "train" not in files:
        raise DataError(expected(source, "imagenet-lt", [*LISTS.values(), "train/n01440764/n01440764_18.JPEG", "val/n01440764/…"]))
    listed = {split: _read_list(source.path / name) for split, name in files.items()}
    folder_of: dict[int, str] = {}
    for paths, labels in listed.values():
        for path, label in zip(paths, labels.tolist(), strict=True):
            if label not in folder_of:
                folder_of[label] = Path(path).parent.name
    lacking = sorted(set(range(max(folder_of) + 1)) - set(folder_of))
    if lacking:
        raise DataError(
            f"{source.path}: labels run to {max(folder_of)}, but {len(lacking)} of them have no image (for example {lacking[0]})."
        )
    known = _class_names(source.path)
    folders = [folder_of[label] for label in range(len(folder_of))]
    names = [known.get(folder, folder) for folder in folders]
    if len(set(names)) < len(names):  # ImageNet has two cranes and two maillots
        names = [f"{name} ({folder})" if names.count(name) > 1 else name for name, folder in zip(names, folders, strict=True)]
    return {
        split: build_table(full_paths(source.path, paths, files[split]), labels, names, paths, source.path)
        for split, (paths, labels) in listed.items()
    }


def _read_list(file: Path) -> tuple[list[str], np.ndarray]:
    """Paths and labels of a list; the path may hold spaces, the label stands last."""
    if not file.is_file():
        raise DataError(f"there is no list {file}; name it in data.files, for example {{train: my_train.txt}}.")
    paths, labels = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.rstrip().rpartition(" ")
        if not path or not label.isdecimal():
            raise DataError(f"{file}, line {number}: 'path label' is expected, the label a whole number from 0; got '{line[:120]}'.")
        paths.append(path.strip())
        labels.append(int(label))
    if not paths:
        raise DataError(f"{file} is empty.")
    return paths, np.asarray(labels, np.int64)


def _class_names(root: Path) -> dict[str, str]:
    """`{folder: name}`, the first of the names that are given for it."""
    file = next((root / name for name in NAME_FILES if (root / name).is_file()), None)
    if file is None:
        return {}
    pairs = (line.partition(" ") for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return {folder: name.split(",")[0].strip() for folder, _, name in pairs}
