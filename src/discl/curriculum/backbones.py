"""Image classifiers of transformers, and of timm where it is installed, behind one forward: pixels to logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError


class TransformersClassifier(nn.Module):
    """Any `AutoModelForImageClassification`, from its configuration as plain values; freshly initialised."""

    def __init__(self, settings: dict[str, Any], class_names: Sequence[str]) -> None:
        from transformers import AutoModelForImageClassification

        super().__init__()
        self.model = AutoModelForImageClassification.from_config(
            _configuration(settings, class_names)
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

        Raises CheckpointError where another weight is missing or of another shape.
        """
        from transformers import AutoModelForImageClassification

        try:
            found, told = AutoModelForImageClassification.from_pretrained(
                folder,
                config=self.model.config,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"'{folder}' cannot be loaded as an image classifier: {error}"
            ) from error
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
        self.model = found


def _of_a_head(name: str, model: Any) -> bool:
    """Whether a weight is outside of the backbone; where that is no module of its own, whether it is named as classifiers are."""
    if hasattr(model, model.base_model_prefix):
        return not name.startswith(f"{model.base_model_prefix}.")
    first = name.partition(".")[0]
    return first.endswith("classifier") or first in {"head", "score", "fc"}


class TimmClassifier(nn.Module):
    """A model of timm, `{"name": ...}`, freshly initialised. Raises CheckpointError where timm is not installed."""

    def __init__(self, settings: dict[str, Any], num_classes: int) -> None:
        super().__init__()
        timm = import_timm()
        try:
            self.model = timm.create_model(
                settings["name"], pretrained=False, num_classes=num_classes
            )
        except RuntimeError as error:
            raise CheckpointError(f"timm has no model '{settings['name']}': {error}") from error

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, classes]` of normalised pixels `[batch, 3, h, w]`."""
        return self.model(x)

    @property
    def head(self) -> nn.Module:
        """The last layer, which turns features into logits."""
        return self.model.get_classifier()

    def load_pretrained(self, file: Path) -> None:
        """Takes over the weights of a safetensors file, but for a head of other classes. Raises CheckpointError where they do not fit."""
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"'{file}' holds no weights: {error}") from error
        own = self.model.state_dict()
        fitting = {
            name: tensor
            for name, tensor in found.items()
            if name in own and own[name].shape == tensor.shape
        }
        head = {f"{name}" for name, module in self.model.named_modules() if module is self.head}
        lacking = [
            name for name in own if name not in fitting and name.rpartition(".")[0] not in head
        ]
        if lacking:
            raise CheckpointError(
                f"'{file}' lacks {len(lacking)} tensors of this model, such as {lacking[0]}; is it another model's?"
            )
        self.model.load_state_dict({**own, **fitting})


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

    try:
        configuration = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"'{folder}' holds no model of transformers: {error}") from error
    if type(configuration) not in AutoModelForImageClassification._model_mapping:
        raise CheckpointError(
            f"'{folder}' holds a model of the family '{configuration.model_type}', of which transformers has no image classifier."
            + (" Use architecture: clip." if configuration.model_type == "clip" else "")
        )
    return json.loads(configuration.to_json_string(use_diff=True))


def read_normalisation(
    folder: Path,
) -> tuple[tuple[float, float, float], tuple[float, float, float], int | None] | None:
    """(mean, std, side to resize to) of a folder's `preprocessor_config.json`; None where it has none."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    if "image_mean" not in found or "image_std" not in found:
        return None
    size = found.get("size")
    side = size.get("shortest_edge") if isinstance(size, dict) else size
    (a, b, c), (x, y, z) = found["image_mean"], found["image_std"]
    return (a, b, c), (x, y, z), side


def _configuration(settings: dict[str, Any], class_names: Sequence[str]) -> Any:
    from transformers import AutoConfig

    plain = {
        key: value
        for key, value in settings.items()
        if key not in {"id2label", "label2id", "num_labels", "model_type"}
    }
    try:
        configuration = AutoConfig.for_model(settings["model_type"], **plain)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"no network can be built from this configuration of transformers: {error}"
        ) from error
    configuration.id2label = dict(enumerate(class_names))
    configuration.label2id = {name: label for label, name in enumerate(class_names)}
    return configuration
