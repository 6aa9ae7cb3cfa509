"""Prompts, encoded once each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from .models import Conditioning, LatentModel
from .oom import call_halving
from .stats import Work


class Text(NamedTuple):
    """A text that rows are conditioned on; `negative` for negative prompts."""

    words: str
    negative: bool


@dataclass
class TextCache:
    """Text embeddings, each computed once while it is cached.

    They are in the CPU's memory, because a T5's take megabytes each.

    - `model`: encodes texts.
    - `work`: counts them.
    - `limit`: bytes of the embeddings that are kept without being needed.
    - `batch`: texts in a call; halved when memory runs out.
    """

    model: LatentModel
    work: Work
    limit: int = 2**30
    batch: int = 16
    known: OrderedDict[Text, Conditioning] = field(default_factory=OrderedDict)

    def encode(self, texts: Iterable[Text]) -> None:
        """Encodes texts that are not cached.

        Raises CheckpointError where memory does not suffice for a single text.
        """
        unknown = [text for text in dict.fromkeys(texts) if text not in self.known]
        for negative in (True, False):
            new = [text for text in unknown if text.negative == negative]
            while new:
                encoded = call_halving(
                    partial(self._encode, new, negative),
                    self.batch,
                    self._halved,
                    what=("text", "texts"),
                    where="text encoders",
                )
                part, new = new[: self.batch], new[self.batch :]
                self.work.text_encodes += len(part)
                for row, text in enumerate(part):
                    self.known[text] = {
                        name: tensor[row].clone() for name, tensor in encoded.items()
                    }

    def _encode(self, texts: list[Text], negative: bool, size: int) -> Conditioning:
        """One call with the first `size` texts, padded to that many with empty ones."""
        words = [text.words for text in texts[:size]]
        encoded = self.model.encode_texts(words + [""] * (size - len(words)), negative)
        return {name: tensor.cpu() for name, tensor in encoded.items()}

    def _halved(self, size: int) -> None:
        self.batch = size
        self.work.out_of_memory += 1

    def __getitem__(self, text: Text) -> Conditioning:
        if text not in self.known:
            self.encode([text])
        self.known.move_to_end(text)
        return self.known[text]

    def trim(self, needed: set[Text]) -> None:
        """Drops the least recently used texts beyond `limit` bytes, but none that is `needed`."""
        sizes = {
            text: sum(tensor.nbytes for tensor in encoded.values())
            for text, encoded in self.known.items()
        }
        left = sum(sizes.values())
        for text, size in sizes.items():
            if left <= self.limit:
                break
            if text not in needed:
                del self.known[text]
                left -= size
