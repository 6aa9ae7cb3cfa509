"""Captions by an image-to-text model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..checkpoint_checks import (
    check_extent,
    loading,
)
from ..checkpoints import checkpoint_digest
from ..transformers_models import find_model, load_model
from ..utils.hashing import digest

QUESTION = "Describe this picture in one sentence."
"""The default prompt of a model that chats."""


class Captioner:
    """Captions of images by greedy decoding.

    Batches have one static size, so a caption does not depend on the rest of its batch.

    - `address`: a folder in transformers' format, or a name on the hub.
    - `prompt`: the beginning that a plain captioner completes, or the question to a model that
      chats; None: none, or `QUESTION`. Captions do not repeat it.
    - `max_new_tokens`: tokens in a caption, at most.
    - `dtype`: float32, bfloat16 or float16.
    - `batch`: images per batch.

    Raises CheckpointError for a folder of another family, without weights, or with pickled ones
    only.
    """

    def __init__(
        self,
        address: str,
        prompt: str | None = None,
        *,
        max_new_tokens: int = 40,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        batch: int = 16,
    ) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText

        self.folder = folder = find_captioner(address)
        with loading(folder, "an image-to-text model"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            check_extent(
                folder,
                config.to_dict(),
                lambda: AutoModelForImageTextToText.from_config(config, trust_remote_code=False),
            )
            model = load_model(AutoModelForImageTextToText, folder, getattr(torch, dtype))
            self.model = model.eval().to(device)
            self.images, self.tokenizer, self.both = _load_processors(folder)
        self.device, self.batch, self.max_new_tokens = device, batch, max_new_tokens
        self.chats = self.both is not None and bool(getattr(self.both, "chat_template", None))
        self.prompt = prompt or (QUESTION if self.chats else None)
        self.tokenizer.padding_side = "left"

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One line of text per image; empty where the model writes nothing."""
        captions: list[str] = []
        for first in range(0, len(images), self.batch):
            part = list(images[first : first + self.batch])
            inputs = self._inputs([*part, *[part[-1]] * (self.batch - len(part))])
            tokens = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
            )
            given = inputs.get("input_ids", inputs.get("decoder_input_ids"))
            new = tokens if given is None else _without_beginning(tokens, given)
            said = self.tokenizer.batch_decode(new[: len(part)], skip_special_tokens=True)
            captions += [" ".join(text.split()) for text in said]
        return captions

    def _inputs(self, images: list[Image.Image]) -> dict[str, Any]:
        if self.chats:
            content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
            with loading(self.folder, "a captioner that chats, by its chat template"):
                text = self.both.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=False,
                )
            # A list per text: some processors take a flat list for the images of the first text.
            each = [[image] for image in images]
            inputs = dict(
                self.both(images=each, text=[text] * len(images), padding=True, return_tensors="pt")
            )
        else:
            inputs = {
                "pixel_values": self.images(images=images, return_tensors="pt")["pixel_values"]
            }
            if self.prompt is not None:
                inputs |= self._beginning(len(images))
        floating = {
            name: value.to(self.model.dtype)
            for name, value in inputs.items()
            if value.is_floating_point()
        }
        return {name: value.to(self.device) for name, value in {**inputs, **floating}.items()}

    def _beginning(self, rows: int) -> dict[str, torch.Tensor]:
        """Tokens of the prompt without the one that ends a sentence. BLIP removes it itself."""
        tokens = self.tokenizer(self.prompt, return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        family = self.model.config.model_type
        if family == "vision-encoder-decoder":
            started = torch.tensor([[self.model.generation_config.decoder_start_token_id]])
            plain = self.tokenizer(self.prompt, add_special_tokens=False, return_tensors="pt")[
                "input_ids"
            ]
            return {"decoder_input_ids": torch.cat([started, plain], 1).repeat(rows, 1)}
        if not family.startswith("blip") and ids[0, -1] in {
            self.tokenizer.sep_token_id,
            self.tokenizer.eos_token_id,
        }:
            ids, mask = ids[:, :-1], mask[:, :-1]
        return {"input_ids": ids.repeat(rows, 1), "attention_mask": mask.repeat(rows, 1)}


def _without_beginning(tokens: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Generated tokens without the given ones, which most models repeat.

    BLIP replaces the first given token and omits the last.
    """
    for length in (given.shape[1], given.shape[1] - 1):
        if 0 < length <= tokens.shape[1] and bool(
            (tokens[:, 1:length] == given[:, 1:length]).all()
        ):
            return tokens[:, length:]
    return tokens


def describe_captioner(address: str, prompt: str | None, max_new_tokens: int, dtype: str) -> str:
    """Digest of everything that determines a caption besides the image."""
    return digest(checkpoint_digest(find_captioner(address)), prompt, max_new_tokens, dtype)


def find_captioner(address: str) -> Path:
    """Folder of an image-to-text model in transformers' format.

    Raises CheckpointError for another family or missing files.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as FAMILIES,
    )

    return find_model(
        address,
        FAMILIES,
        what="image-to-text model",
        advice="it writes no captions. Name an image-to-text model such as BLIP, GIT, a vision "
        "encoder-decoder or LLaVA.",
    )


def _load_processors(folder: Path) -> tuple[Any, Any, Any]:
    """The processors of images, of texts, and of both; None for the last in older folders."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    both = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    if hasattr(both, "image_processor") and hasattr(both, "tokenizer"):
        return both.image_processor, both.tokenizer, both
    return (
        AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        None,
    )
