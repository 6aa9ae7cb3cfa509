"""`clip_similarity`; keep, or drop with the reason.

Thresholds are on the raw cosine, in [−1, 1]. CLIPScore is 2.5 · max(cos, 0)
(arXiv 2104.08718, eq. 1).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..checkpoint_checks import (
    check_extent,
    check_tokens,
    check_unquantised,
    loading,
)
from ..checkpoints import checkpoint_digest
from ..errors import CheckpointError
from ..transformers_models import find_model, load_model
from ..utils.hashing import digest
from .oom import call_halving


@dataclass(frozen=True)
class Verdict:
    """Keep an image, or drop it with the reason."""

    keep: bool
    reason: str = ""


def judge(clip_similarity: float, threshold: float) -> Verdict:
    """Keeps an image at or above the threshold, or drops it with the reason.

    - `clip_similarity`: raw cosine, in [−1, 1].
    - `threshold`: in [−1, 1].

    ```python
    import discl

    verdict = discl.judge(0.2, threshold=0.25)
    assert not verdict.keep and verdict.reason == "clip_similarity 0.200 < 0.25"
    ```
    """
    if clip_similarity >= threshold:
        return Verdict(True)
    return Verdict(False, f"clip_similarity {clip_similarity:.3f} < {threshold:g}")


def judge_difficulty(probability: float, band: tuple[float, float]) -> Verdict:
    """Keeps an image that is neither too hard nor too easy, or drops it with the reason.

    - `probability`: of its class by a classifier of real images, in [0, 1]; nan if the classifier
      knows no image of the class, which keeps the image.
    - `band`: lowest and highest probability to keep.
    """
    low, high = band
    if probability < low:
        return Verdict(False, f"too hard: probability {probability:.3f} of its class < {low:g}")
    if probability > high:
        return Verdict(False, f"too easy: probability {probability:.3f} of its class > {high:g}")
    return Verdict(True)


class ClipScorer:
    """Raw cosines of images with the text of their label, by a CLIP of transformers.

    A call of the network holds `batch` images and is padded, so a cosine does not depend on its
    neighbours. The batch is halved when memory runs out. `id` identifies checkpoint and texts.

    - `address`: a CLIP: a folder, a hub name, or `embedded:...`.
    - `texts`: `{label: text}`, for example `{0: "a photo of a bag"}`. May be empty for `embed`.
    - `device`: where the network runs.
    - `batch`: images per call, 1 or more.

    Raises CheckpointError for a folder without a CLIP, or with pickled weights only.

    ```python
    from PIL import Image

    import discl

    scorer = discl.ClipScorer("embedded:fashion-mnist/clip", {0: "a photo of a bag"})
    cosines = scorer([Image.open("photos/Bag/000.png").convert("RGB")], [0])
    assert cosines.shape == (1,)
    ```
    """

    def __init__(
        self,
        address: str,
        texts: Mapping[int, str],
        device: torch.device | str = "cpu",
        batch: int = 16,
    ) -> None:
        from transformers import AutoImageProcessor, CLIPConfig, CLIPModel, CLIPTokenizer

        folder = find_clip(address)
        with loading(folder, "a CLIP"):
            config = CLIPConfig.from_pretrained(folder, trust_remote_code=False)
            check_extent(folder, config.to_dict(), lambda: CLIPModel(config))
            self.model = load_model(CLIPModel, folder, torch.float32).eval().to(device)
            self.processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", trust_remote_code=False
            )
            tokenizer = CLIPTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokens = tokenizer(
                list(texts.values()) or [""],
                padding="max_length",
                truncation=True,
                return_tensors="pt",
                max_length=self.model.config.text_config.max_position_embeddings,
            )
            check_tokens(tokens.input_ids, self.model.text_model)
        self.address, self.device, self.labels, self.batch = address, device, list(texts), batch
        self.id = describe_scorer(address, texts)
        with torch.inference_mode():
            self.text_embeddings = self._normalise(
                self.model.get_text_features(input_ids=tokens.input_ids.to(device))
            )

    def __call__(self, images: Sequence[Image.Image], labels: Sequence[int]) -> np.ndarray:
        """The cosine of each image with the text of its label, float32 `[images]` in [−1, 1].

        Raises CheckpointError for broken weights.
        """
        texts = torch.tensor([self.labels.index(label) for label in labels], device=self.device)
        result = np.empty(len(images), np.float32)
        for first, embeddings in self._embeddings(images):
            last = first + len(embeddings)
            cosines = (embeddings * self.text_embeddings[texts[first:last]]).sum(1)
            result[first:last] = cosines.float().cpu().numpy()
        if not np.isfinite(result).all():
            raise CheckpointError(
                f"the CLIP '{self.address}' gives {result[~np.isfinite(result)][0]} as the "
                "similarity of an image: its weights are broken. Download it again, or use another."
            )
        return result

    def embed(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Embeddings of length 1, float32 `[images, dimensions]`: products of rows are cosines."""
        parts = [embeddings.cpu().numpy() for _, embeddings in self._embeddings(images)]
        return (
            np.concatenate(parts)
            if parts
            else np.empty((0, self.text_embeddings.shape[1]), np.float32)
        )

    def _embeddings(self, images: Sequence[Image.Image]) -> Iterator[tuple[int, torch.Tensor]]:
        """(index of the first image, embeddings) of each call of the network."""
        first = 0

        def embed(size: int) -> torch.Tensor:
            part = list(images[first : first + size])
            pixels = torch.cat(list(threads.map(self._prepare, part)))
            padded = torch.zeros(size, *pixels.shape[1:])
            padded[: len(part)] = pixels
            with torch.inference_mode():
                features = self.model.get_image_features(pixel_values=padded.to(self.device))
                return self._normalise(features)[: len(part)]

        def on_halved(size: int) -> None:
            self.batch = size

        advice = "use a device with more memory."
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # resizing is most of the work
            while first < len(images):
                embeddings = call_halving(embed, self.batch, on_halved, where="CLIP", advice=advice)
                yield first, embeddings
                first += len(embeddings)

    def _prepare(self, image: Image.Image) -> torch.Tensor:
        """Pixels of an image as the checkpoint's processor makes them, `[1, 3, side, side]`.

        A square is resized beforehand, as the processor does it. Threads share that work, but not
        the processor's copies of a large picture.
        """
        edge, plain = self.processor.size.get("shortest_edge"), image.mode == "RGB"
        if self.processor.do_resize and edge and plain and image.width == image.height:
            image = image.resize((edge, edge), self.processor.resample)
        return self.processor(images=image, return_tensors="pt")["pixel_values"]

    @staticmethod
    def _normalise(features: Any) -> torch.Tensor:
        if not isinstance(features, torch.Tensor):
            features = features.pooler_output
        return torch.nn.functional.normalize(features.float(), dim=1)


def describe_scorer(address: str, texts: Mapping[int, str]) -> str:
    """Digest of the CLIP and of the texts: a score is valid for this scorer only."""
    return digest(checkpoint_digest(find_clip(address)), sorted(texts.items()))


def find_clip(address: str) -> Path:
    """Folder of a CLIP in transformers' format.

    Raises CheckpointError for another family, and for missing files.
    """
    folder = find_model(
        address,
        {"clip"},
        what="CLIP folder",
        advice="the filter needs a CLIP (model_type 'clip').",
    )
    check_unquantised(folder)
    return folder
