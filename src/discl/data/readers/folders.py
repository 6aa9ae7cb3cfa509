"""A folder per class.

Read by hand because `datasets` copies every image, and torchvision drops files without a word.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ...errors import DataError
from ..gate import refuse_outside
from ..listing import HIDDEN_FOLDER, LeftOut, count_empty, is_picture_name, known_suffixes
from ..table import ImageTable
from .building import Source, build_table, known_splits

BOXES = {
    "_annotations.csv": "boxes, in TensorFlow's CSV",
    "_annotations.txt": "boxes",
    "createml.json": "boxes of CreateML",
    ".xml": "boxes of Pascal VOC",
    ".tfrecord": "TensorFlow's records",
    "_mask.png": "masks",
}
"""Suffixes of files that describe objects in images, in exports of Roboflow and others."""
CUT_OUT = (
    "Crop the objects first, or export the images with a folder for each class (Roboflow: a "
    "classification project, 'Folder structure')."
)
SHOWN_FOLDERS = 8
SHOWN_CLASSES = 4


def read_image_folder(source: Source) -> dict[str, ImageTable]:
    """root/class/image or root/split/class/image; all splits have the same classes."""
    root = source.path
    by_split = _class_folders(source)
    names = sorted({folder.name for folders in by_split.values() for folder in folders})
    label_of = {name: label for label, name in enumerate(names)}
    _count_unlabelled(source, by_split)
    tables = {}
    for split, folders in by_split.items():
        paths: list[str] = []
        labels: list[np.ndarray] = []
        for folder in folders:
            images = _images_of_class(folder, source)
            paths += images
            labels.append(np.full(len(images), label_of[folder.name]))
        ids = [Path(path[len(str(root)) + 1 :]).as_posix() for path in paths]
        tables[split] = build_table(paths, np.concatenate(labels), names, ids=ids, root=root)
    return tables


def _class_folders(source: Source) -> dict[str, list[Path]]:
    """`{split: folders of its classes}`. Raises DataError for other layouts."""
    root = source.path
    folders = subfolders(root) if root.is_dir() else []
    if not folders:
        raise DataError(
            f"'{root}' has no sub-folders; expected root/class/image.jpg or "
            "root/train/class/image.jpg.",
            argument="root",
        )
    if not _are_splits(folders, set(source.splits.values())):
        _check_labelled(root, folders)
        return {"train": folders}
    kept = [folder for folder in folders if not source.leaves_out(folder.name)]
    by_split = {folder.name: subfolders(folder) for folder in kept}
    for split, class_folders in by_split.items():
        _check_labelled(root / split, class_folders)
    return by_split


def _count_unlabelled(source: Source, by_split: dict[str, list[Path]]) -> None:
    root = source.path
    for folder in {root, *(each.parent for folders in by_split.values() for each in folders)}:
        for file in folder.iterdir():
            name = file.relative_to(root).as_posix()
            if is_picture_name(file.name) and file.is_file():
                source.unread.add("in no class", name)
            elif file.name.startswith(".") and file.is_dir() and holds_images(file):
                source.unread.add(HIDDEN_FOLDER, name)


def _images_of_class(folder: Path, source: Source) -> list[str]:
    """Sorted paths of the images in a class's folder. Raises DataError for none."""
    refuse_outside([folder], source.path)
    left_out = LeftOut()
    images = sorted(images_below(str(folder), source.path, left_out))
    if not images:
        others = f" It holds {left_out}." if left_out else ""
        raise DataError(
            f"class '{folder.name}' has no images: none in {folder} ends in {known_suffixes()}."
            f"{others}"
        )
    source.unread.merge(left_out, f"{folder.relative_to(source.path).as_posix()}/")
    return images


def _check_labelled(folder: Path, class_folders: list[Path]) -> None:
    """Raises DataError for a split without class folders, and for data of an object detector."""
    names = {each.name for each in class_folders}
    if names == {"images", "labels"}:
        raise DataError(
            f"{folder} holds images/ and labels/, the layout of YOLO: boxes of objects, and no "
            f"class for a whole image. {CUT_OUT}"
        )
    if class_folders:
        return
    if not holds_images(folder):
        raise DataError(
            f"{folder} holds neither folders of classes nor images; remove it, or leave the split "
            "out, for example {test: null}.",
            argument="splits",
        )
    detector = next(
        (
            f"{file.name} ({kind})"
            for file in sorted(folder.iterdir())
            for mark, kind in BOXES.items()
            if file.name.lower().endswith(mark)
        ),
        None,
    )
    if detector is not None:
        raise DataError(
            f"{folder} holds images and {detector}, and no folder for each class. {CUT_OUT}"
        )
    raise DataError(
        f"{folder} holds images and no folders of classes, so they have no label. Leave the split "
        "out, for example {test: null} (discl predict labels new images), or move the images into "
        "folders of their classes.",
        argument="splits",
    )


def holds_images(folder: Path) -> bool:
    """Whether a folder holds images directly."""
    return any(is_picture_name(each.name) and each.is_file() for each in os.scandir(folder))


def too_few_classes(root: str, names: Sequence[str]) -> str | None:
    """Message for data with fewer than two classes; None for others."""
    if len(names) > 1:
        return None
    message = f"'{root}' has only one class, {names[0]}; at least two are needed"
    top = Path(root).expanduser()
    for folder in (top / names[0], *sorted(top.glob(f"*/{glob.escape(names[0])}"))):
        below = _folders_with_images(folder) if folder.is_dir() else []
        if not below or holds_images(folder):
            continue
        shown = ", ".join(each.name for each in below[:SHOWN_CLASSES])
        found = f"{folder} holds only folders ({shown}{', …' * (len(below) > SHOWN_CLASSES)})"
        if folder.parent == top:
            return f"{message}. {found}: did you mean {folder} as the root?"
        return f"{message}. {found}: if these are the classes, move them up into {folder.parent}."
    return f"{message}. Expected are a folder, or a label, for each class."


def _folders_with_images(folder: Path) -> list[Path]:
    return [
        each
        for each in subfolders(folder)
        if next(images_below(str(each), folder, LeftOut()), None)
    ]


def images_below(
    folder: str, root: Path, left_out: LeftOut, top: str | None = None
) -> Iterator[str]:
    """Paths of the images below a folder; links inside the root are followed.

    - `root`: of the data set.
    - `left_out`: gets the files that are not images.
    - `top`: the folder that examples in `left_out` are relative to.
    """
    top = top or folder
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.path[len(top) + 1 :]
            if entry.name.startswith("."):
                left_out.add("hidden", name)
            elif _is_folder(entry):
                if entry.is_symlink():
                    _refuse_circle(Path(entry.path))
                    refuse_outside([Path(entry.path)], root)
                images = images_below(entry.path, root, left_out, top)
                yield from count_empty(images, entry.name, name, left_out)
            elif is_picture_name(entry.name):
                if entry.is_symlink():
                    refuse_outside([Path(entry.path)], root)
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
    """Raises DataError for a link to a folder that contains it: reading would not end."""
    if link.parent.resolve().is_relative_to(link.resolve()):
        raise DataError(f"{link} leads to {link.resolve()}, which contains it; delete the link.")


def _are_splits(folders: list[Path], named: set[str]) -> bool:
    """Whether the folders are splits rather than classes. Raises DataError for a mixture."""
    known = set(known_splits())
    splits = [folder for folder in folders if folder.name in named or folder.name.lower() in known]
    others = [folder.name for folder in folders if folder not in splits]
    if others and splits and any(subfolders(folder) for folder in splits):
        raise DataError(
            f"{folders[0].parent} holds splits ({', '.join(folder.name for folder in splits)}) and "
            f"other folders ({', '.join(others[:SHOWN_FOLDERS])}); move those away, or name them "
            "if they are splits.",
            argument="splits",
        )
    return not others


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted by name, without hidden ones."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
