"""Image classifiers of transformers and timm."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpoint_checks import (
    check_extent,
    check_surplus,
    check_unquantised,
    loading,
    read_json,
    read_preprocessing,
)
from ..errors import CheckpointError
from ..run_folder import paths


class TransformersClassifier(nn.Module):
    """An `AutoModelForImageClassification` of transformers, initialised at random.

    - `settings`: its configuration as plain values.
    - `class_names`: names of the labels, `[classes]`.
    """

    def __init__(self, settings: dict[str, Any], class_names: Sequence[str]) -> None:
        from transformers import AutoModelForImageClassification

        super().__init__()
        configuration = _configuration(settings, class_names)
        with building():
            self.model = AutoModelForImageClassification.from_config(
                configuration, trust_remote_code=False
            )

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, classes]` of normalised pixels `[batch, 3, h, w]`."""
        return self.model(pixel_values=x).logits

    @property
    def head(self) -> nn.Module:
        """The last layer, from features to logits."""
        for name in ("classifier", "head", "score"):
            found = getattr(self.model, name, None)
            if isinstance(found, nn.Module) and next(found.parameters(), None) is not None:
                return found
        raise CheckpointError(
            f"a {type(self.model).__name__} has no head that can be trained alone; fine-tune the "
            "whole network (fine_tune: full)."
        )

    def load_pretrained(self, folder: Path) -> None:
        """Loads the weights of a folder; a missing head or one of other classes stays random.

        Raises CheckpointError for other missing weights, other shapes, and surplus weights.
        """
        from transformers import AutoModelForImageClassification

        check_unquantised(folder)
        with loading(folder, "an image classifier"):
            found, loaded = AutoModelForImageClassification.from_pretrained(
                folder,
                config=self.model.config,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
        absent = [
            *loaded["missing_keys"],
            *(key if isinstance(key, str) else key[0] for key in loaded["mismatched_keys"]),
        ]
        missing = sorted(name for name in absent if not _of_a_head(name, found))
        if missing:
            raise CheckpointError(
                f"'{folder}' has no {', '.join(missing[:3])}: {len(missing)} weights of its "
                "config.json are missing. Download it again, or train from random weights "
                "(pretrained: false)."
            )
        check_surplus(
            folder,
            loaded["unexpected_keys"],
            lambda name: _of_a_head(name, found) or _of_pretraining(name),
        )
        self.model = found


def _of_pretraining(name: str) -> bool:
    """Whether a tensor serves pretraining or features only: a pooler, the mask token."""
    return "pooler" in name.split(".") or name.endswith("mask_token")


def _of_a_head(name: str, model: Any) -> bool:
    """Whether a weight is outside of the backbone, or else named as a classifier's."""
    if hasattr(model, model.base_model_prefix):
        return not name.startswith(f"{model.base_model_prefix}.")
    first = name.partition(".")[0]
    return first.endswith("classifier") or first in {"head", "score", "fc"}


class TimmClassifier(nn.Module):
    """A model of timm, initialised at random.

    - `settings`: `name`, and optionally `model_args` (of `create_model`) and `global_pool`.
    - `num_classes`: number of labels.

    Raises CheckpointError where timm is not installed, or has no such model.
    """

    def __init__(self, settings: dict[str, Any], num_classes: int) -> None:
        super().__init__()
        options = dict(settings.get("model_args") or {})
        self.model = _make_timm(settings["name"], num_classes, options)
        pool = settings.get("global_pool")
        if pool and (_pooling(self.model) or pool) != pool:
            self.model = _make_timm(settings["name"], num_classes, {**options, "global_pool": pool})

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, classes]` of normalised pixels `[batch, 3, h, w]`."""
        return self.model(x)

    @property
    def head(self) -> nn.Module:
        """The last layer, from features to logits."""
        return self.model.get_classifier()

    def load_pretrained(self, folder: Path) -> None:
        """Loads the weights of a folder; a head of other classes stays random.

        Raises CheckpointError for missing weights, other shapes, and surplus weights.
        """
        file = folder / paths.WEIGHTS
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"'{file}' holds no weights: {error}") from error
        own = self.model.state_dict()
        heads = self._heads()
        fitting = {
            name: tensor
            for name, tensor in found.items()
            if name in own and own[name].shape == tensor.shape
        }
        missing = [name for name in own if name not in fitting and not name.startswith(heads)]
        if missing:
            raise CheckpointError(
                f"'{file}' has no {missing[0]} of this model's shape: {len(missing)} tensors are "
                "missing. It may belong to another model."
            )
        check_surplus(file, found.keys() - own.keys(), lambda name: name.startswith(heads))
        self.model.load_state_dict({**own, **fitting})

    def _heads(self) -> tuple[str, ...]:
        """Name prefixes of the head's tensors; a distilled model has two heads."""
        named = self.model.get_classifier()
        heads = named if isinstance(named, tuple | list) else (named,)
        names = [
            name
            for name, module in self.model.named_modules()
            if any(module is head for head in heads)
        ]
        listed = (getattr(self.model, "default_cfg", None) or {}).get("classifier") or ()
        names += [listed] if isinstance(listed, str) else list(listed)
        return tuple(f"{name}." for name in names if name)


def _make_timm(name: str, num_classes: int, options: Mapping[str, Any]) -> Any:
    timm = import_timm()
    if not isinstance(name, str) or not TIMM_NAME.fullmatch(name) or NOT_A_MODEL & options.keys():
        raise CheckpointError(
            f"{name!r:.80} with {sorted(options)!r:.200} is not a model of timm's registry; "
            "weights come from the folder alone."
        )
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except Exception as error:
        detail = f" with {dict(options)}" if options else ""
        raise CheckpointError(f"timm cannot create '{name}'{detail}: {error}") from error


def _pooling(model: Any) -> str | None:
    """Pooling of a model of timm, None where it is not stated."""
    head = getattr(model, "head", None)
    for holder, name in ((head, "global_pool"), (head, "pool_type"), (model, "global_pool")):
        found = getattr(holder, name, None)
        found = getattr(found, "pool_type", found)
        if isinstance(found, str):
            return found
    return None


def import_timm() -> Any:
    """The package timm. Raises CheckpointError where it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise CheckpointError(
            "architecture timm needs the package timm: pip install 'discl[timm]'."
        ) from error
    return timm


def read_transformers_settings(folder: Path) -> dict[str, Any]:
    """The configuration of an image classifier as plain values.

    Raises CheckpointError where there is none.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    with loading(folder, "a model of transformers"):
        configuration = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(configuration) not in AutoModelForImageClassification._model_mapping:
        raise CheckpointError(
            f"'{folder}' holds a model of the family '{configuration.model_type}', for which "
            "transformers has no image classifier."
            + (" Use architecture: clip." if configuration.model_type == "clip" else "")
        )
    settings = json.loads(configuration.to_json_string(use_diff=True))
    check_extent(
        folder,
        settings,
        lambda: AutoModelForImageClassification.from_config(configuration, trust_remote_code=False),
    )
    return settings


TIMM_NAME = re.compile(r"[a-zA-Z0-9_]+(\.[a-zA-Z0-9_]+)?")
"""A name in timm's registry, never an address such as `hf-hub:owner/name`."""
NOT_A_MODEL = {
    "pretrained",
    "num_classes",
    "checkpoint_path",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "scriptable",
}
"""Arguments of `create_model` that say where weights come from; ignored in a folder's config."""


def read_timm_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of `TimmClassifier`, preparation of its images) of a folder that timm saved.

    `model_args` such as layer scale, pooling and sizes are part of the network and are kept.

    Raises CheckpointError for a config.json without a model of timm.
    """
    found = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    name, options = found.get("architecture"), found.get("model_args") or {}
    if not isinstance(name, str) or not TIMM_NAME.fullmatch(name):
        raise CheckpointError(
            f"'{folder}' is not a model of timm: the architecture in its config.json is "
            f"{name!r:.80}."
        )
    if not isinstance(options, dict):
        raise CheckpointError(
            f"'{folder}': model_args of config.json is {options!r:.80}, not a mapping."
        )
    options = {key: value for key, value in options.items() if key not in NOT_A_MODEL}
    preprocessing = found.get("pretrained_cfg") or {}
    if not isinstance(preprocessing, dict):
        raise CheckpointError(f"'{folder}': pretrained_cfg of config.json is not a mapping.")
    if options.get("in_chans", 3) != 3:
        raise CheckpointError(
            f"'{folder}' takes images of {options['in_chans']!r:.20} channels; use a model of 3."
        )
    if options.get("dynamic_img_size") or options.get("strict_img_size") is False:
        preprocessing = {**preprocessing, "fixed_input_size": False}
    elif (side := options.get("img_size")) is not None:
        sides = side if isinstance(side, list | tuple) else (side, side)
        preprocessing = {**preprocessing, "input_size": (3, *sides)}
    settings: dict[str, Any] = {"name": name}
    if options:
        settings["model_args"] = options
    if isinstance(pool := found.get("global_pool"), str) and pool and "global_pool" not in options:
        settings["global_pool"] = pool
    with suppress(ImportError):
        import timm  # noqa: F401

        check_extent(folder, options, lambda: TimmClassifier(settings, 1))
    return settings, preprocessing


def read_normalisation(
    folder: Path,
) -> tuple[tuple[float, float, float], tuple[float, float, float], int | None] | None:
    """(mean, std, side to resize to) of the image processor of a folder, None without one.

    It is in `preprocessor_config.json`, with transformers 5 in `processor_config.json`. Raises
    CheckpointError for wrong values.
    """
    found = read_preprocessing(folder)
    if found is None or "image_mean" not in found or "image_std" not in found:
        return None
    size = found.get("size")
    side = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
    if side is not None and (not isinstance(side, int) or not 0 < side < 100_000):
        raise CheckpointError(
            f"'{folder}': the size {size!r:.80} of its images is not a number of pixels."
        )
    mean = three_numbers(folder, "image_mean", found["image_mean"])
    return mean, three_numbers(folder, "image_std", found["image_std"], positive=True), side


def three_numbers(
    folder: Path, name: str, values: Any, positive: bool = False
) -> tuple[float, float, float]:
    """Three finite numbers of a configuration, one per channel. Raises CheckpointError."""
    usable = isinstance(values, list | tuple) and len(values) == 3
    if not usable or not all(
        isinstance(each, int | float)
        and not isinstance(each, bool)
        and abs(each) < 1e6
        and (each > 0 or not positive)
        for each in values
    ):
        kind = "numbers above 0" if positive else "finite numbers"
        raise CheckpointError(
            f"'{folder}': {name} is {values!r:.80}, where three {kind} are expected."
        )
    return float(values[0]), float(values[1]), float(values[2])


@contextmanager
def building() -> Iterator[None]:
    """Raises errors of transformers as CheckpointError."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            "transformers cannot build a network from this configuration: "
            f"{type(error).__name__}: {error}"
        ) from error


def _configuration(settings: dict[str, Any], class_names: Sequence[str]) -> Any:
    from transformers import AutoConfig

    plain = {
        key: value
        for key, value in settings.items()
        if key not in {"id2label", "label2id", "num_labels", "model_type"}
    }
    with building():
        configuration = AutoConfig.for_model(settings["model_type"], **plain)
    configuration.id2label = dict(enumerate(class_names))
    configuration.label2id = {name: label for label, name in enumerate(class_names)}
    return configuration
