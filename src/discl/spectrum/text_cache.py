"""Prompts, encoded once each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import CheckpointError
from ..utils.console import say
from .models import Conditioning, LatentModel
from .oom import MEND, free_cached, is_out_of_memory
from .stats import Work


class Text(NamedTuple):
    """A text that rows are conditioned on, and whether guidance leads away from it."""

    words: str
    negative: bool


@dataclass
class Texts:
    """Text embeddings, each computed once while it is remembered: those that are waited for, and others while all take `limit` bytes.

    They lie in the CPU's memory: a T5's take megabytes each. The batch is halved where the device's memory does not suffice.
    """

    model: LatentModel
    work: Work
    limit: int = 2**30
    batch: int = 16
    known: OrderedDict[Text, Conditioning] = field(default_factory=OrderedDict)

    def learn(self, texts: Iterable[Text]) -> None:
        """Encodes what is not known. Raises CheckpointError where the memory does not suffice for a single text."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self.known]
        for negative in (True, False):
            new = [text for text in unknown if text.negative == negative]
            while new:
                part = new[: self.batch]
                encoded = self._encode([text.words for text in part], negative)
                if encoded is None:
                    continue
                new = new[len(part) :]
                self.work.text_encodes += len(part)
                for row, text in enumerate(part):
                    self.known[text] = {
                        name: tensor[row].clone() for name, tensor in encoded.items()
                    }

    def _encode(self, words: list[str], negative: bool) -> Conditioning | None:
        """One call, filled up to the batch; None where it ran out of memory, after which the batch is half as large."""
        try:
            encoded = self.model.encode_texts(words + [""] * (self.batch - len(words)), negative)
            return {name: tensor.cpu() for name, tensor in encoded.items()}
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if self.batch == 1:
            raise CheckpointError(
                "out of memory with a single text in a call of the text encoders; " + MEND
            )
        say(
            f"out of memory with {self.batch} texts in a call of the text encoders: {self.batch // 2} from now on"
        )
        self.batch //= 2
        self.work.out_of_memory += 1
        free_cached()
        return None

    def __getitem__(self, text: Text) -> Conditioning:
        if text not in self.known:
            self.learn([text])
        self.known.move_to_end(text)
        return self.known[text]

    def trim(self, needed: set[Text]) -> None:
        """Forgets the least recently used texts while all of them take more than `limit` bytes, but none that is `needed`."""
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
