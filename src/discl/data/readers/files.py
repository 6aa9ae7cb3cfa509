"""Folders of images; lists of ImageNet-LT."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ...assets import common_names
from ...errors import DataError
from ..listing import LeftOut, is_picture_name, known_suffixes
from ..table import ImageTable
from .building import SPLIT_NAMES, Source, build_table, expected, full_paths, refuse_escape
from .labels import is_whole
from .opening import read_text

LISTS = {
    "train": "ImageNet_LT_train.txt",
    "val": "ImageNet_LT_val.txt",
    "test": "ImageNet_LT_test.txt",
}
LONGEST_LABEL = 18
BOXES = {
    "_annotations.csv": "boxes, in TensorFlow's CSV",
    "_annotations.txt": "boxes",
    "createml.json": "boxes of CreateML",
    ".xml": "boxes of Pascal VOC",
    ".tfrecord": "TensorFlow's records",
    "_mask.png": "masks",
}
"""How files end that describe objects in images, in exports of Roboflow and others."""
CUT_OUT = (
    "Cut the objects out first, or export the images with a folder for each class (Roboflow: a classification project, "
    "'Folder structure')."
)
WORDNET_NAMES = "LOC_synset_mapping.txt"
NAME_FILES = (WORDNET_NAMES, "classnames.txt")


def read_image_folder(source: Source) -> dict[str, ImageTable]:
    """root/class/image or root/split/class/image; the classes of all splits together."""
    root, named_splits = source.path, set(source.splits.values())
    folders = subfolders(root) if root.is_dir() else []
    if not folders:
        raise DataError(
            f"data.root '{root}' has no sub-folders; expected root/class/image.jpg or root/train/class/image.jpg."
        )
    by_split = {"train": folders}
    if _are_splits(folders, named_splits):
        kept = [folder for folder in folders if not source.leaves_out(folder.name)]
        by_split = {folder.name: subfolders(folder) for folder in kept}
    for split, class_folders in by_split.items():
        _refuse_unlabelled(root / split if class_folders is not folders else root, class_folders)
    names = sorted({folder.name for class_folders in by_split.values() for folder in class_folders})
    label_of = {name: label for label, name in enumerate(names)}
    inside = len(str(root)) + 1
    for folder in {root, *(each.parent for listed in by_split.values() for each in listed)}:
        for file in folder.iterdir():
            if is_picture_name(file.name) and file.is_file():
                source.unread.add("in no class", file.relative_to(root).as_posix())
    tables = {}
    for split, class_folders in by_split.items():
        paths: list[str] = []
        labels: list[np.ndarray] = []
        for folder in class_folders:
            refuse_escape([folder], root)
            there = LeftOut()
            found = sorted(images_below(str(folder), root, there))
            if not found:
                told = f", and there are {there}" if there else ""
                raise DataError(
                    f"class '{folder.name}' has no images: none in {folder} ends in {known_suffixes()}{told}."
                )
            source.unread.merge(there, f"{folder.relative_to(root).as_posix()}/")
            paths += found
            labels.append(np.full(len(found), label_of[folder.name]))
        tables[split] = build_table(
            paths,
            np.concatenate(labels),
            names,
            [Path(path[inside:]).as_posix() for path in paths],
            root,
        )
    return tables


def _refuse_unlabelled(folder: Path, class_folders: list[Path]) -> None:
    """Raises DataError for a split without folders of classes, and for the folders of a detector's data set."""
    names = {each.name for each in class_folders}
    if names == {"images", "labels"}:
        raise DataError(
            f"{folder} holds images/ and labels/, as YOLO has them: boxes of objects, and no class for a whole image. {CUT_OUT}"
        )
    if class_folders:
        return
    if not holds_images(folder):
        raise DataError(
            f"{folder} holds neither folders of classes nor images; remove it, or leave the split out, for example "
            "data.splits: {test: null}."
        )
    found = next(
        (
            f"{file.name} ({kind})"
            for file in sorted(folder.iterdir())
            for mark, kind in BOXES.items()
            if file.name.lower().endswith(mark)
        ),
        None,
    )
    if found is not None:
        raise DataError(
            f"{folder} holds images and {found}, and no folder for each class. {CUT_OUT}"
        )
    raise DataError(
        f"{folder} holds images and no folders of classes, so they have no label. Leave the split out, for example "
        "data.splits: {test: null} (discl predict labels new images), or move the images into folders of their classes."
    )


def holds_images(folder: Path) -> bool:
    """Whether images lie right in a folder."""
    return any(is_picture_name(each.name) and each.is_file() for each in os.scandir(folder))


def too_few_classes(root: str, names: Sequence[str]) -> str | None:
    """What is said of data with fewer than two classes, of which no classifier can be learned; None for others."""
    if len(names) > 1:
        return None
    told = f"'{root}' has only one class, {names[0]}; at least two are needed"
    for folder in (
        Path(root).expanduser() / names[0],
        *sorted(Path(root).expanduser().glob(f"*/{glob.escape(names[0])}")),
    ):
        below = (
            [
                each
                for each in subfolders(folder)
                if next(images_below(str(each), folder, LeftOut()), None)
            ]
            if folder.is_dir()
            else []
        )
        if not below or any(
            is_picture_name(each.name) for each in folder.iterdir() if each.is_file()
        ):
            continue
        found = f"{folder} holds only folders ({', '.join(each.name for each in below[:4])}{', …' * (len(below) > 4)})"
        if folder.parent == Path(root).expanduser():
            return f"{told}. {found}: did you mean data.root: {folder}?"
        return f"{told}. {found}: if these are the classes, move them up into {folder.parent}."
    return f"{told}. Expected are a folder, or a label, for each class."


def images_below(
    folder: str, root: Path, left_out: LeftOut, top: str | None = None
) -> Iterator[str]:
    """Paths of the images below a folder, links within the root followed; what is not taken goes to `left_out`."""
    top = top or folder
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.path[len(top) + 1 :]
            if entry.name.startswith("."):
                left_out.add("hidden", name)
            elif _is_folder(entry):
                if entry.is_symlink():
                    _refuse_circle(Path(entry.path))
                    refuse_escape([Path(entry.path)], root)
                yield from images_below(entry.path, root, left_out, top)
            elif is_picture_name(entry.name):
                if entry.is_symlink():
                    refuse_escape([Path(entry.path)], root)
                yield entry.path
            else:
                left_out.add(Path(entry.name).suffix.lower() or ".", name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link that leads to itself
        raise DataError(
            f"{entry.path} cannot be followed: {error.strerror}; delete the link."
        ) from error


def _refuse_circle(link: Path) -> None:
    """Raises DataError for a link to a folder that it lies in, below which there would be no end."""
    if link.parent.resolve().is_relative_to(link.resolve()):
        raise DataError(
            f"{link} leads to {link.resolve()}, in which it lies itself; delete the link."
        )


def _are_splits(folders: list[Path], named: set[str]) -> bool:
    """Whether the folders are splits rather than classes. Raises DataError where only some look like it."""
    known = {name for names in SPLIT_NAMES.values() for name in names}
    like_splits = [
        folder for folder in folders if folder.name in named or folder.name.lower() in known
    ]
    others = [folder.name for folder in folders if folder not in like_splits]
    if others and like_splits and any(subfolders(folder) for folder in like_splits):
        raise DataError(
            f"{folders[0].parent} holds splits ({', '.join(folder.name for folder in like_splits)}) and other folders "
            f"({', '.join(others[:8])}); move those away, or name them in data.splits if they are splits."
        )
    return not others


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, hidden ones left out, sorted by name."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def read_lists(source: Source) -> dict[str, ImageTable]:
    """Split lists of "path label" over one folder of images per class, as ImageNet-LT has them (arXiv 1904.05160).

    The three lists lie at the root, or `data.files` names those that there are: `{train: my_train.txt, test: my_test.txt}`. ILSVRC's `val/`
    may be flat or in folders, whatever the lists say. Class names come from `LOC_synset_mapping.txt` or `classnames.txt` (lines "folder
    name") at the root where one is there, else they are the folders' names. WordNet's first names that say too little in a text (two
    cranes, two maillots, a Cardigan and a cardigan) are replaced by those of `assets/names/imagenet.yaml`; so are names of
    `classnames.txt` that two classes share. Raises DataError where the lists give one folder two labels.
    """
    files = source.files or LISTS
    there = [name for name in files.values() if (source.path / name).is_file()]
    if "train" not in files or (not source.files and LISTS["train"] not in there):
        raise DataError(expected(source, "imagenet-lt"))
    if not source.files and len(there) < len(LISTS):
        lacking = " and ".join(name for name in LISTS.values() if name not in there)
        raise DataError(
            f"data.root '{source.root}' lacks {lacking}, so figures would be on other images than the published ones. Add the list, or "
            f"name those that there are in data.files, for example {{train: {LISTS['train']}}}; data.own_split then makes the others."
        )
    listed = {split: _read_list(source.path / name) for split, name in files.items()}
    folder_of = _folders_of({files[split]: each for split, each in listed.items()}, source.path)
    folders = list(folder_of.values())
    place = {label: number for number, label in enumerate(folder_of)}
    names = _told_apart(_class_names(source.path), folders)
    tables = {}
    for split, (paths, numbers) in listed.items():
        labels = np.asarray([place[number] for number in numbers], np.int64)
        placed = full_paths(
            source.path, _as_on_disk(source.path, paths, labels, folders), files[split]
        )
        tables[split] = build_table(placed, labels, names, paths, source.path)
    return tables


def _folders_of(lists: dict[str, tuple[list[str], list[int]]], root: Path) -> dict[int, str]:
    """The folder of each label, in order of the labels, from all lists but those over one flat folder.

    Raises DataError where a label has two folders or a folder two labels (lists of different versions), or no folder.
    """
    folder_of: dict[int, tuple[str, str]] = {}
    label_of: dict[str, tuple[int, str]] = {}
    for name, (paths, labels) in lists.items():
        pairs = dict.fromkeys(
            zip(
                (path.rpartition("/")[0].rpartition("/")[2] for path in paths),
                labels,
                strict=True,
            )
        )
        if len(lists) > 1 and len(pairs) > 1 and len({folder for folder, _ in pairs}) == 1:
            continue  # the flat val/ of ILSVRC
        for folder, label in pairs:
            other, where = folder_of.setdefault(label, (folder, name))
            another, place = label_of.setdefault(folder, (label, name))
            if other != folder or another != label:
                told = f"label {label} is {other} in {where} and {folder} in {name}" if other != folder else (
                    f"{folder} has the label {another} in {place} and {label} in {name}"
                )  # fmt: skip
                raise DataError(
                    f"{root}: {told}; the lists are of different versions. Images whose folder is not their class are read by "
                    "data.format: manifest."
                )
    lacking = sorted({label for _, labels in lists.values() for label in labels} - set(folder_of))
    if lacking:
        raise DataError(
            f"{root}: {len(lacking)} labels have no image in a folder (for example {lacking[0]}), so their classes have no name."
        )
    return {label: folder for label, (folder, _) in sorted(folder_of.items())}


def _as_on_disk(root: Path, paths: list[str], labels: np.ndarray, folders: list[str]) -> list[str]:
    """The paths as they are, or, by where the first one lies, without the folder of their class, or with it."""
    first, name = paths[0].rpartition("/")[0::2]
    if (root / paths[0]).exists():
        return paths
    if (root / Path(first).parent / name).exists():
        return [
            f"{path.rpartition('/')[0].rpartition('/')[0]}/{path.rpartition('/')[2]}".lstrip("/")
            for path in paths
        ]
    if (root / first / folders[labels[0]] / name).exists():
        return [
            f"{path.rpartition('/')[0]}/{folders[label]}/{path.rpartition('/')[2]}"
            for path, label in zip(paths, labels, strict=True)
        ]
    return paths


def _read_list(file: Path) -> tuple[list[str], list[int]]:
    """Paths and labels of a list; the path may hold spaces, the label stands last."""
    if not file.is_file():
        raise DataError(
            f"there is no list {file}; name it in data.files, for example {{train: my_train.txt}}."
        )
    paths, labels = [], []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        *path, label = line.strip().rsplit(None, 1)
        if not path or not (is_whole(label) and label.isdigit() and len(label) <= LONGEST_LABEL):
            raise DataError(
                f"{file}, line {number}: 'path label' is expected, the label a whole number from 0; got '{line[:120]}'."
            )
        paths.append(path[0].strip())
        labels.append(int(label))
    if not paths:
        raise DataError(f"{file} is empty.")
    full_paths(file.parent, paths, file.name)
    return paths, labels


def _class_names(root: Path) -> dict[str, str]:
    """`{folder: name}`, the first of the names that are given for it, or ours where that one says too little."""
    file = next((root / name for name in NAME_FILES if (root / name).is_file()), None)
    if file is None:
        return {}
    pairs = (line.partition(" ") for line in read_text(file).splitlines() if line.strip())
    known = {folder: name.split(",")[0].strip() for folder, _, name in pairs}
    if file.name == WORDNET_NAMES:
        known |= {folder: names[0] for folder, names in common_names("imagenet").items()}
    return known


def _told_apart(known: dict[str, str], folders: list[str]) -> list[str]:
    """The name of each folder: where two share one but for capitals ours, else with the folder behind it."""
    ours = {folder: names[0] for folder, names in common_names("imagenet").items()}
    names = [known.get(folder, folder) for folder in folders]
    names = [
        ours.get(folder, name) if shared else name
        for folder, name, shared in zip(folders, names, _shared(names), strict=True)
    ]
    return [
        f"{name} ({folder})" if shared else name
        for folder, name, shared in zip(folders, names, _shared(names), strict=True)
    ]


def _shared(names: list[str]) -> list[bool]:
    """Whether each name stands several times, but for capitals."""
    counts = Counter(name.casefold() for name in names)
    return [counts[name.casefold()] > 1 for name in names]
