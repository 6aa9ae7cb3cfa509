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


class TransformersClassifier(nn.Module):
    """Any `AutoModelForImageClassification`, from its configuration as plain values; freshly initialised."""

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
        """The last layer, which turns features into logits."""
        for name in ("classifier", "head", "score"):
            found = getattr(self.model, name, None)
            if isinstance(found, nn.Module) and next(found.parameters(), None) is not None:
                return found
        raise CheckpointError(
            f"the head of a {type(self.model).__name__} was not found, so it cannot be trained alone; use fine_tune: full."
        )

    def load_pretrained(self, folder: Path) -> None:
        """Takes over the weights of a folder; a head that it lacks, or has for other classes, is drawn anew.

        Raises CheckpointError where another weight is missing or of another shape, or where the backbone has no place for one.
        """
        from transformers import AutoModelForImageClassification

        check_unquantised(folder)
        with loading(folder, "an image classifier"):
            found, told = AutoModelForImageClassification.from_pretrained(
                folder,
                config=self.model.config,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
        absent = [
            *told["missing_keys"],
            *(key if isinstance(key, str) else key[0] for key in told["mismatched_keys"]),
        ]
        lacking = sorted(name for name in absent if not _of_a_head(name, found))
        if lacking:
            raise CheckpointError(
                f"'{folder}' lacks {len(lacking)} weights that its config.json promises, such as {', '.join(lacking[:3])}; "
                "download it again, or set train.model.pretrained: false."
            )
        check_surplus(
            folder,
            told["unexpected_keys"],
            lambda name: _of_a_head(name, found) or _of_pretraining(name),
        )
        self.model = found


def _of_pretraining(name: str) -> bool:
    """Whether a tensor of a backbone is one that only its pretraining or its features need: a pooler, the masked patch."""
    return "pooler" in name.split(".") or name.endswith("mask_token")


def _of_a_head(name: str, model: Any) -> bool:
    """Whether a weight is outside of the backbone; where that is no module of its own, whether it is named as classifiers are."""
    if hasattr(model, model.base_model_prefix):
        return not name.startswith(f"{model.base_model_prefix}.")
    first = name.partition(".")[0]
    return first.endswith("classifier") or first in {"head", "score", "fc"}


class TimmClassifier(nn.Module):
    """A model of timm, freshly initialised.

    `settings` are `name`, and where there are any `model_args` (those of `create_model`) and `global_pool`.

    Raises CheckpointError where timm is not installed, or makes no such model.
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
        """The last layer, which turns features into logits."""
        return self.model.get_classifier()

    def load_pretrained(self, file: Path) -> None:
        """Takes over the weights of a safetensors file, but for a head of other classes.

        Raises CheckpointError where they do not fit, where some are missing, or where the model has no place for some.
        """
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
        lacking = [name for name in own if name not in fitting and not name.startswith(heads)]
        if lacking:
            raise CheckpointError(
                f"'{file}' lacks {len(lacking)} tensors of this model, such as {lacking[0]}; is it another model's?"
            )
        check_surplus(file, found.keys() - own.keys(), lambda name: name.startswith(heads))
        self.model.load_state_dict({**own, **fitting})

    def _heads(self) -> tuple[str, ...]:
        """Beginnings of the names of the classifier's tensors; a model may have two, one of them for distillation."""
        named = self.model.get_classifier()
        heads = named if isinstance(named, tuple | list) else (named,)
        names = [
            name
            for name, module in self.model.named_modules()
            if any(module is head for head in heads)
        ]
        told = (getattr(self.model, "default_cfg", None) or {}).get("classifier") or ()
        names += [told] if isinstance(told, str) else list(told)
        return tuple(f"{name}." for name in names if name)


def _make_timm(name: str, num_classes: int, options: Mapping[str, Any]) -> Any:
    timm = import_timm()
    if not isinstance(name, str) or not TIMM_NAME.fullmatch(name) or NOT_A_MODEL & options.keys():
        raise CheckpointError(
            f"{name!r:.80} with {sorted(options)!r:.200} is no model of timm's own; weights come from the folder alone."
        )
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except Exception as error:
        told = f" with {dict(options)}" if options else ""
        raise CheckpointError(f"timm makes no model '{name}'{told}: {error}") from error


def _pooling(model: Any) -> str | None:
    """How a model of timm pools, where it says so."""
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
    """The configuration of an image classifier as plain values. Raises CheckpointError where there is none."""
    from transformers import AutoConfig, AutoModelForImageClassification

    with loading(folder, "a model of transformers"):
        configuration = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(configuration) not in AutoModelForImageClassification._model_mapping:
        raise CheckpointError(
            f"'{folder}' holds a model of the family '{configuration.model_type}', of which transformers has no image classifier."
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
"""A model of timm's own registry, never an address such as `hf-hub:owner/name`."""
NOT_A_MODEL = {
    "pretrained", "num_classes", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable",
}  # fmt: skip
"""Arguments of `create_model` that say where weights come from; those of a folder's `model_args` are left out."""


def read_timm_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what `TimmClassifier` takes, how its pictures are prepared) of a folder that timm saved.

    `model_args` are kept where there are any, such as layer scale, pooling and sizes: without them it is another network.
    Raises CheckpointError for a config.json that names no model of timm.
    """
    found = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    name, options = found.get("architecture"), found.get("model_args") or {}
    if not isinstance(name, str) or not TIMM_NAME.fullmatch(name):
        raise CheckpointError(
            f"'{folder}' is no model of timm: its config.json names no architecture of timm (got {name!r:.80})."
        )
    if not isinstance(options, dict):
        raise CheckpointError(
            f"'{folder}': model_args of config.json is {options!r:.80}, no mapping."
        )
    options = {key: value for key, value in options.items() if key not in NOT_A_MODEL}
    feeding = found.get("pretrained_cfg") or {}
    if not isinstance(feeding, dict):
        raise CheckpointError(f"'{folder}': pretrained_cfg of config.json is no mapping.")
    if options.get("in_chans", 3) != 3:
        raise CheckpointError(
            f"'{folder}' takes pictures of {options['in_chans']!r:.20} channels; only those of 3 are supported."
        )
    if options.get("dynamic_img_size") or options.get("strict_img_size") is False:
        feeding = {**feeding, "fixed_input_size": False}
    elif (side := options.get("img_size")) is not None:
        sides = side if isinstance(side, list | tuple) else (side, side)
        feeding = {**feeding, "input_size": (3, *sides)}
    settings: dict[str, Any] = {"name": name}
    if options:
        settings["model_args"] = options
    if isinstance(pool := found.get("global_pool"), str) and pool and "global_pool" not in options:
        settings["global_pool"] = pool
    with suppress(ImportError):
        import timm  # noqa: F401

        check_extent(folder, options, lambda: TimmClassifier(settings, 1))
    return settings, feeding


def read_normalisation(
    folder: Path,
) -> tuple[tuple[float, float, float], tuple[float, float, float], int | None] | None:
    """(mean, std, side to resize to) of `preprocessor_config.json`, or of transformers 5's `processor_config.json`.

    None where the folder does not say. Raises CheckpointError for values that are no three numbers, or no size.
    """
    found = read_preprocessing(folder)
    if found is None or "image_mean" not in found or "image_std" not in found:
        return None
    size = found.get("size")
    side = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
    if side is not None and (not isinstance(side, int) or not 0 < side < 100_000):
        raise CheckpointError(
            f"'{folder}': the size {size!r:.80} of its pictures is no number of pixels."
        )
    mean = three_numbers(folder, "image_mean", found["image_mean"])
    return mean, three_numbers(folder, "image_std", found["image_std"], positive=True), side


def three_numbers(
    folder: Path, name: str, values: Any, positive: bool = False
) -> tuple[float, float, float]:
    """Three finite numbers of a configuration, one per channel. Raises CheckpointError for anything else."""
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
    """Whatever transformers raises where it builds a network from plain values, as CheckpointError."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"no network can be built from this configuration of transformers: {type(error).__name__}: {error}"
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
