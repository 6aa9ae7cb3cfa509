"""CLIP as a classifier: zero-shot head, FLYP, weight ensembling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint_checks import (
    check_extent,
    check_tokens,
    check_unquantised,
    loading,
)
from ..errors import CheckpointError
from ..transformers_models import load_model
from .pretrained import building, read_normalisation

LARGEST_SCALE = math.log(100)
"""Upper bound of the learned log scale (arXiv 2103.00020, section 2.5)."""

TEXTS_AT_ONCE = 256


class ClipClassifier(nn.Module):
    """A CLIP with a linear head over normalised image features; weights come by `load_pretrained`.

    - `settings`: those of transformers' `CLIPConfig` as plain values, and `prompts` (templates per
      class), `prompt_length` and `rebuild`: whether the head is rebuilt from the text tower each
      time that the model turns to evaluation.
    - `num_classes`: number of labels.
    """

    prompts: Tensor

    def __init__(self, settings: Mapping[str, Any], num_classes: int) -> None:
        from transformers import CLIPConfig, CLIPModel

        super().__init__()
        self.rebuilds = bool(settings["rebuild"])
        with building():
            configuration = CLIPConfig(
                text_config=settings["text_config"],
                vision_config=settings["vision_config"],
                projection_dim=settings["projection_dim"],
            )
            self.clip: Any = CLIPModel(configuration)
        self.head = nn.Linear(settings["projection_dim"], num_classes)
        self.register_buffer(
            "prompts",
            torch.zeros(
                num_classes, settings["prompts"], settings["prompt_length"], dtype=torch.int64
            ),
        )
        if self.rebuilds:
            self.head.requires_grad_(False)  # it is rebuilt from the text tower

    def features(self, x: Tensor) -> Tensor:
        """Normalised image embeddings of normalised pixels, float32 `[batch, dim]`.

        - `x`: `[batch, 3, h, w]`.
        """
        return F.normalize(
            self.clip.get_image_features(pixel_values=x).pooler_output.float(), dim=1
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, classes]` of normalised pixels `[batch, 3, h, w]`."""
        return self.head(self.features(x))

    def texts(self, tokens: Tensor) -> Tensor:
        """Normalised text embeddings, float32 `[texts, dim]`, of tokens `[texts, length]`."""
        return F.normalize(
            self.clip.get_text_features(input_ids=tokens).pooler_output.float(), dim=1
        )

    @property
    def scale(self) -> Tensor:
        """exp of the learned log scale."""
        return self.clip.logit_scale.exp()

    def draw_prompts(self, images: int) -> Tensor:
        """A random prompt index for each image, int64 `[images]`."""
        return torch.randint(self.prompts.shape[1], (images,))

    def pairs(self, x: Tensor, labels: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of images and of one prompt of each image's class, both `[batch, dim]`.

        A prompt of several images is encoded once.

        - `x`: normalised pixels, `[batch, 3, h, w]`.
        - `labels`: `[batch]`.
        - `drawn`: indices from `draw_prompts`, `[batch]`.
        """
        distinct, index = torch.unique(
            labels * self.prompts.shape[1] + drawn.to(labels.device), return_inverse=True
        )
        return self.features(x), self.texts(self.prompts.flatten(0, 1)[distinct])[index]

    @torch.no_grad()
    def rebuild_head(self) -> None:
        """Makes the head zero-shot (arXiv 2103.00020, section 3.1.4).

        The weight of a class is the normalised mean of its prompts' embeddings, times the scale.
        """
        count = self.prompts.shape[1]
        embeddings = torch.cat(
            [self.texts(chunk) for chunk in self.prompts.flatten(0, 1).split(TEXTS_AT_ONCE)]
        )
        mean = embeddings.unflatten(0, (-1, count)).mean(1)
        self.head.weight.copy_(self.scale.float() * F.normalize(mean, dim=1))
        self.head.bias.zero_()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Clamps the learned log scale to [0, log 100]."""
        self.clip.logit_scale.clamp_(0, LARGEST_SCALE)

    def train(self, mode: bool = True) -> ClipClassifier:
        """Sets training or evaluation mode; evaluation rebuilds the head where `rebuild` is set."""
        turned = mode != self.training
        super().train(mode)
        if turned and not mode and self.rebuilds:
            self.rebuild_head()
        return self

    def load_pretrained(self, folder: Path, prompts: Tensor) -> None:
        """Loads the weights of a CLIP folder and builds the zero-shot head.

        - `prompts`: tokens of the class prompts, int64 `[classes, prompts, length]`.

        Raises CheckpointError for missing or surplus weights.
        """
        from transformers import CLIPModel

        check_unquantised(folder)
        with loading(folder, "a CLIP"):
            self.clip = load_model(CLIPModel, folder, torch.float32)
            check_tokens(prompts, self.clip.text_model)
        self.prompts.copy_(prompts)
        self.rebuild_head()


class ClipTower(nn.Module):
    """The image tower of a CLIP without its projection, initialised at random.

    - `settings`: those of transformers' `CLIPVisionConfig` as plain values.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        with building():
            self.model: Any = CLIPVisionModel(CLIPVisionConfig(**settings))

    def forward(self, x: Tensor) -> Tensor:
        """Features `[batch, channels]` of normalised pixels `[batch, 3, h, w]`."""
        return self.model(pixel_values=x).pooler_output


def tower_of(clip: Any) -> dict[str, Tensor]:
    """The weights of the image tower of a CLIP, for `LightClassifier.load_base`."""
    return {f"model.{name}": each for name, each in clip.vision_model.state_dict().items()}


def read_clip_tower(folder: Path) -> dict[str, Tensor]:
    """The weights of the image tower of a CLIP folder, as `tower_of`.

    Raises CheckpointError for missing or surplus weights.
    """
    from transformers import CLIPModel

    check_unquantised(folder)
    with loading(folder, "a CLIP"):
        return tower_of(load_model(CLIPModel, folder, torch.float32))


def tokenize(folder: Path, texts: Mapping[str, Sequence[str]]) -> Tensor:
    """Tokens of class prompts, int64 `[classes, prompts, length]`.

    - `texts`: `{class: prompts}`, equally many for every class.

    Raises CheckpointError where the folder holds no tokenizer.
    """
    from transformers import CLIPTokenizer

    flat = [text for each in texts.values() for text in each]
    length = read_clip_settings(folder)["text_config"].get("max_position_embeddings", 77)
    with loading(folder, "a CLIP's tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokens = tokenizer(
            flat, padding="longest", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
    return tokens.unflatten(0, (len(texts), -1))


def read_clip_settings(folder: Path) -> dict[str, Any]:
    """The configuration of a CLIP folder for `ClipClassifier`.

    Raises CheckpointError for another family.
    """
    from transformers import AutoConfig, CLIPModel

    with loading(folder, "a model of transformers"):
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if found.model_type != "clip":
        raise CheckpointError(
            f"'{folder}' holds a model of the family '{found.model_type}'; architecture clip needs "
            "a CLIP."
        )
    settings = {
        "text_config": _plain(found.text_config),
        "vision_config": _plain(found.vision_config),
        "projection_dim": found.projection_dim,
    }
    check_extent(folder, settings, lambda: CLIPModel(found))
    return settings


def _plain(configuration: Any) -> dict[str, Any]:
    kept = configuration.to_diff_dict()
    return {
        key: value
        for key, value in kept.items()
        if key not in {"transformers_version", "dtype", "architectures"}
    }


def clip_preprocessing(
    folder: Path, settings: Mapping[str, Any]
) -> tuple[int, int, tuple[float, float, float], tuple[float, float, float]]:
    """(image size, side to resize to, mean, std) that a CLIP was trained with.

    Raises CheckpointError where the folder does not state them.
    """
    found = read_normalisation(folder)
    if found is None:
        raise CheckpointError(
            f"'{folder}' has no preprocessor_config.json or processor_config.json with image_mean "
            "and image_std."
        )
    size = int(settings["vision_config"].get("image_size", 224))
    mean, std, side = found
    return size, max(side or size, size), mean, std


def interpolate(
    pretrained: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """(1 − α) θ_pretrained + α θ_tuned (arXiv 2109.01903, eq. 1), exact at α = 0 and α = 1.

    - `pretrained`, `tuned`: state dicts of one network. Tensors of integers come from `tuned`.
    - `alpha`: α in [0, 1].
    """
    if alpha in (0.0, 1.0):
        return dict(tuned if alpha else pretrained)
    return {
        name: (1 - alpha) * pretrained[name] + alpha * tensor
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tuned.items()
    }
