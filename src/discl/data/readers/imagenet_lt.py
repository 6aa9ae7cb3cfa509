"""Lists of ImageNet-LT.

Read by hand because the lists have no format of their own: the folders on disk may differ from
those in the lists, and WordNet's first names make poor prompts.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from ...assets import common_names
from ...errors import DataError
from ..table import ImageTable
from .building import Source, build_table, expected, full_paths
from .labels import is_whole
from .opening import read_text

LISTS = {
    "train": "ImageNet_LT_train.txt",
    "val": "ImageNet_LT_val.txt",
    "test": "ImageNet_LT_test.txt",
}
LONGEST_LABEL = 18
SHOWN_CHARACTERS = 120
WORDNET_NAMES = "LOC_synset_mapping.txt"
NAME_FILES = (WORDNET_NAMES, "classnames.txt")


def read_lists(source: Source) -> dict[str, ImageTable]:
    """Split lists of "path label" over one folder of images per class (arXiv 1904.05160).

    - The three lists are at the root, or `files` names some of them:
      `{train: my_train.txt, test: my_test.txt}`.
    - ILSVRC's `val/` may be flat or in folders, whatever the lists say.
    - Class names come from `LOC_synset_mapping.txt` or `classnames.txt` (lines "folder name") at
      the root, else they are the folders' names.
    - WordNet's ambiguous first names (two cranes, two maillots, a Cardigan and a cardigan) are
      replaced by those of `assets/names/imagenet.yaml`. So are duplicate names in
      `classnames.txt`.

    Raises DataError where the lists give one folder two labels.
    """
    files = source.files or LISTS
    present = [name for name in files.values() if (source.path / name).is_file()]
    if "train" not in files or (not source.files and LISTS["train"] not in present):
        raise expected(source, "imagenet-lt")
    if not source.files and len(present) < len(LISTS):
        absent = " and ".join(name for name in LISTS.values() if name not in present)
        raise DataError(
            f"'{source.root}' lacks {absent}, so results would be on other images than published "
            f"ones. Add the list, or name the others, for example {{train: {LISTS['train']}}}; "
            "the other splits are then made from the training images.",
            argument="files",
        )
    listed = {split: _read_list(source.path / name) for split, name in files.items()}
    folder_of = _match_folders({files[split]: each for split, each in listed.items()}, source.path)
    folders = list(folder_of.values())
    new_label = {label: number for number, label in enumerate(folder_of)}
    names = _distinguish(_read_class_names(source.path), folders)
    tables = {}
    for split, (paths, numbers) in listed.items():
        labels = np.asarray([new_label[number] for number in numbers], np.int64)
        on_disk = _as_on_disk(source.path, paths, labels, folders)
        checked = full_paths(source.path, on_disk, files[split])
        tables[split] = build_table(checked, labels, names, ids=paths, root=source.path)
    return tables


def _match_folders(lists: dict[str, tuple[list[str], list[int]]], root: Path) -> dict[int, str]:
    """The folder of each label, by label, from all lists except those over one flat folder.

    Raises DataError for a label with two folders or none, and for a folder with two labels.
    """
    folder_of: dict[int, tuple[str, str]] = {}
    label_of: dict[str, tuple[int, str]] = {}
    for name, (paths, labels) in lists.items():
        folders = (path.rpartition("/")[0].rpartition("/")[2] for path in paths)
        pairs = dict.fromkeys(zip(folders, labels, strict=True))
        if len(lists) > 1 and len(pairs) > 1 and len({folder for folder, _ in pairs}) == 1:
            continue  # the flat val/ of ILSVRC
        for folder, label in pairs:
            first_folder, folder_list = folder_of.setdefault(label, (folder, name))
            first_label, label_list = label_of.setdefault(folder, (label, name))
            if first_folder != folder:
                clash = f"label {label} is {first_folder} in {folder_list} and {folder} in {name}"
            elif first_label != label:
                clash = (
                    f"{folder} has the label {first_label} in {label_list} and {label} in {name}"
                )
            else:
                continue
            raise DataError(
                f"{root}: {clash}; the lists are of different versions. Read images whose folder "
                "is not their class as a manifest.",
                argument="kind",
            )
    absent = sorted({label for _, labels in lists.values() for label in labels} - set(folder_of))
    if absent:
        raise DataError(
            f"{root}: {len(absent)} labels have no image in a folder (for example {absent[0]}), so "
            "their classes have no name."
        )
    return {label: folder for label, (folder, _) in sorted(folder_of.items())}


def _as_on_disk(root: Path, paths: list[str], labels: np.ndarray, folders: list[str]) -> list[str]:
    """The paths with or without the folder of the class, by where the first image is."""
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
    """Paths and labels of a list; the label is the last word, so paths may hold spaces."""
    if not file.is_file():
        raise DataError(
            f"there is no list {file}; name it, for example {{train: my_train.txt}}.",
            argument="files",
        )
    paths, labels = [], []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        *path, label = line.strip().rsplit(None, 1)
        if not path or not (is_whole(label) and label.isdigit() and len(label) <= LONGEST_LABEL):
            raise DataError(
                f"{file}, line {number}: 'path label' is expected, the label a whole number from "
                f"0; got '{line[:SHOWN_CHARACTERS]}'."
            )
        paths.append(path[0].strip())
        labels.append(int(label))
    if not paths:
        raise DataError(f"{file} is empty.")
    full_paths(file.parent, paths, file.name)
    return paths, labels


def _read_class_names(root: Path) -> dict[str, str]:
    """`{folder: name}`: the first name in the file, or a better one of ours."""
    file = next((root / name for name in NAME_FILES if (root / name).is_file()), None)
    if file is None:
        return {}
    pairs = (line.partition(" ") for line in read_text(file).splitlines() if line.strip())
    names = {folder: name.split(",")[0].strip() for folder, _, name in pairs}
    if file.name == WORDNET_NAMES:
        names |= {folder: better[0] for folder, better in common_names("imagenet").items()}
    return names


def _distinguish(known: dict[str, str], folders: list[str]) -> list[str]:
    """A unique name for each folder, ignoring case: ours, else followed by the folder."""
    ours = {folder: names[0] for folder, names in common_names("imagenet").items()}
    names = [known.get(folder, folder) for folder in folders]
    names = [
        ours.get(folder, name) if duplicate else name
        for folder, name, duplicate in zip(folders, names, _duplicates(names), strict=True)
    ]
    return [
        f"{name} ({folder})" if duplicate else name
        for folder, name, duplicate in zip(folders, names, _duplicates(names), strict=True)
    ]


def _duplicates(names: list[str]) -> list[bool]:
    """Whether each name occurs several times, ignoring case."""
    counts = Counter(name.casefold() for name in names)
    return [counts[name.casefold()] > 1 for name in names]
