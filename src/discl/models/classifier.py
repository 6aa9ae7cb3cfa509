"""Any classifier from its configuration, to disk and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint_checks import check_configuration, check_extent
from ..errors import CheckpointError
from ..run_folder import paths
from ..utils.atomic import make_folder
from ..utils.stored import (
    broken,
    read_header,
    read_json,
    read_tensors,
    reading,
    save_tensors,
    write_text,
)
from .clip import ClipClassifier
from .light import LightClassifier, check_light, find_base, read_base
from .pretrained import TimmClassifier, TransformersClassifier
from .resnet import ARCHITECTURES, ResNet

TRAINED_AGAIN = "Delete its folder and train the method again."

FROM_CHECKPOINT = ("transformers", "timm", "clip")
"""Families whose architecture comes from a checkpoint."""


@dataclass(frozen=True)
class ClassifierConfig:
    """Everything needed to build a classifier and to prepare its input.

    - `architecture`: a key of `ARCHITECTURES`, or one of `FROM_CHECKPOINT`.
    - `stem`: `7x7` or `3x3` (ResNets only).
    - `width`: channels after the stem (ResNets only).
    - `class_names`: names of the labels, `[classes]`.
    - `image_size`: side of the input in pixels.
    - `resize`: side in pixels before the crop.
    - `mean`, `std`: per channel, of pixels in [0, 1].
    - `head`: `linear`, or `cosine` between features and class vectors (ResNets only).
    - `backbone`: the network of a checkpoint, so that a saved classifier does not need it.
    - `depth`: black and white of grey images of more than 8 bits, as in `Depth.plain`, if it was
      trained on them.
    - `light`: adapters, head and base of a `LightClassifier`, as in `check_light`.
    """

    architecture: str
    stem: str
    width: int
    class_names: tuple[str, ...]
    image_size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    head: str = "linear"
    backbone: Mapping[str, Any] | None = None
    depth: Mapping[str, Any] | None = None
    light: Mapping[str, Any] | None = None


def build_classifier(config: ClassifierConfig) -> nn.Module:
    """The network of a configuration, initialised from torch's random state."""
    classes = len(config.class_names)
    if config.light is not None:
        backbone = config.backbone or {}
        return LightClassifier(config.architecture, backbone, config.light, classes)
    if config.architecture == "clip":
        return ClipClassifier(dict(config.backbone or {}), classes)
    if config.architecture == "transformers":
        return TransformersClassifier(dict(config.backbone or {}), config.class_names)
    if config.architecture == "timm":
        return TimmClassifier(dict(config.backbone or {}), classes)
    known = ARCHITECTURES[config.architecture]
    stem = "3x3" if config.architecture.endswith("-cifar") else config.stem
    return ResNet(
        known["blocks"],
        config.width,
        classes,
        stem=stem,
        shortcut=known["shortcut"],
        head=config.head,
    )


def normalise(pixels: Tensor, config: ClassifierConfig) -> Tensor:
    """(pixels − mean) / std for float pixels `[batch, 3, h, w]` in [0, 1]."""
    mean, std = (
        torch.tensor(values, device=pixels.device).view(1, 3, 1, 1)
        for values in (config.mean, config.std)
    )
    return (pixels - mean) / std


def save_classifier(
    model: nn.Module, config: ClassifierConfig, folder: Path, fingerprint: str = ""
) -> None:
    """Writes `model.safetensors` and `config.json`; of light tuning the light part alone.

    - `fingerprint`: identifies the data and settings of the training; stored with the weights for
      `check_classifier`.

    Raises WriteError where the disk refuses.
    """
    training = model.training
    model.eval()  # a CLIP that learns from texts rebuilds its head
    make_folder(folder)
    write_config(config, folder)
    metadata = {"fingerprint": fingerprint} if fingerprint else {}
    if config.light is not None:
        metadata["base"] = str(config.light["base"])
    save_tensors(model.state_dict(), folder / paths.WEIGHTS, metadata)
    model.train(training)


def write_config(config: ClassifierConfig, folder: Path) -> None:
    """Writes `config.json`."""
    plain = asdict(config)
    for later in ("depth", "light"):
        if plain[later] is None:
            del plain[later]
    write_text(folder / paths.CONFIG, json.dumps(plain, indent=2, ensure_ascii=False))


def read_config(folder: Path) -> ClassifierConfig:
    """Reads `config.json`. Raises BrokenFileError where it is missing or broken."""
    path = folder / paths.CONFIG
    plain = read_json(path, "architecture", "class_names", advice=TRAINED_AGAIN)
    with reading(path, TRAINED_AGAIN):
        settings: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()
        }
        return ClassifierConfig(**settings)


def check_classifier(folder: Path, config: ClassifierConfig, fingerprint: str = "") -> None:
    """Checks the names and shapes of the weights in a folder.

    - `config`: the network that the weights have to fit.
    - `fingerprint`: refuse weights that were saved with another one.

    Raises BrokenFileError for broken weights or those of another network.
    """
    path = folder / paths.WEIGHTS
    found, metadata = read_header(path, TRAINED_AGAIN)
    with reading(path, TRAINED_AGAIN), torch.random.fork_rng(devices=[]), torch.device("meta"):
        wanted = {
            name: tuple(each.shape) for name, each in build_classifier(config).state_dict().items()
        }
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise broken(
                path,
                f"belongs to another network: '{name}' has the shape {found.get(name)}, expected "
                f"{wanted.get(name)}",
                TRAINED_AGAIN,
            )
    if fingerprint and metadata.get("fingerprint", fingerprint) != fingerprint:
        raise broken(path, "was trained on other data or settings", TRAINED_AGAIN)


MOST = 8192
"""Channels, and pixels a side, at most, as in a recipe."""


def first_cause(error: Exception) -> str:
    """The first two lines of an error as one line of at most 500 characters."""
    if type(error) is KeyError:
        return f"it has no {error}"[:500]
    return " ".join(line.strip() for line in str(error).splitlines()[:2])[:500]


def load_classifier(
    folder: Path, base: str | Path | None = None
) -> tuple[nn.Module, ClassifierConfig]:
    """A trained classifier in evaluation mode, and its configuration.

    - `folder`: a folder with `model.safetensors` and `config.json`, as `RUN/train/METHOD`.
    - `base`: of a classifier with `fine_tune: light`, the checkpoint that it was tuned over, if it
      is no longer where it was. It is identified by its digest.

    Raises CheckpointError where the folder holds no classifier of discl, and where the base is
    missing or another one.

    ```python
    import discl

    model, config = discl.load_classifier("runs/fashion-lt/train/discl")
    assert len(config.class_names) == 10
    ```
    """
    folder = Path(folder)
    with _classifier_of(folder):
        config = read_config(folder)
        _check_config(config)
        check_configuration(folder, config.backbone)
    if config.light is not None:
        try:
            of_base = find_base(config.light, base)
        except CheckpointError as error:
            raise CheckpointError(f"'{folder}': {error.args[0]}", argument="base") from error
    with _classifier_of(folder):
        if config.light is not None:
            check_extent(of_base, asdict(config), lambda: build_classifier(config))
        else:
            check_extent(folder, asdict(config), lambda: build_classifier(config), paths.WEIGHTS)
        model = build_classifier(config)
        if isinstance(model, LightClassifier):
            _check_base(folder, config)
            model.load_base(read_base(of_base, config.architecture, config.backbone or {}))
        tensors = read_tensors(folder / paths.WEIGHTS, TRAINED_AGAIN)
        _check_values(tensors, model.state_dict())
        model.load_state_dict(tensors)
    return model.eval(), config


@contextmanager
def _classifier_of(folder: Path) -> Iterator[None]:
    """Turns errors of reading a classifier into CheckpointErrors that name its folder."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"'{folder}' holds no classifier of discl: {first_cause(error)}"
        ) from error


def _check_base(folder: Path, config: ClassifierConfig) -> None:
    """Raises CheckpointError where the weights were tuned over another base than config.json."""
    stated = (config.light or {})["base"]
    _, metadata = read_header(folder / paths.WEIGHTS, TRAINED_AGAIN)
    found = metadata.get("base")
    if found != stated:
        raise CheckpointError(
            f"its weights were tuned over the base of digest {found}, and its {paths.CONFIG} names "
            f"{stated}."
        )


def _check_values(stored: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> None:
    """Raises ValueError for tensors that are not finite, or of other numbers than the network's."""
    for name, tensor in stored.items():
        if name in network and network[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"'{name}' is of {str(tensor.dtype).removeprefix('torch.')}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"'{name}' has values that are not finite")


def _check_config(config: ClassifierConfig) -> None:
    """Raises ValueError for sizes, normalisation or class names that no classifier can have."""
    for name, least in (("width", 0), ("image_size", 1), ("resize", 1)):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
            raise ValueError(f"{name} is {value!r:.80}")
    for name in ("light", "backbone"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name} is {value!r:.80}, no mapping")
    if config.light is not None:
        check_light(config.light)
    for name in ("mean", "std"):
        values = getattr(config, name)
        numbers = [each for each in values if isinstance(each, int | float) and abs(each) < 1e6]
        if len(numbers) != 3 or len(values) != 3 or (name == "std" and min(numbers) <= 0):
            raise ValueError(f"{name} is {values!r:.80}")
    names = config.class_names
    if (
        not isinstance(names, tuple)
        or not names
        or not all(isinstance(each, str) for each in names)
    ):
        raise ValueError(f"class_names are {names!r:.80}")
