"""Class tokens: learned embeddings in the place of a class's name in prompts (arXiv 2208.01618)."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ...checkpoint_checks import loading
from ...checkpoints import find_weights, weights_digest
from ...errors import CheckpointError, DataError, shorten
from ...utils.counts import count_of
from ...utils.logging import get_logger
from ...utils.stored import save_tensors

logger = get_logger(__name__)

MOST_TOKENS = 16
"""Most tokens of a class: a prompt has 77 for CLIP."""
FAMILIES = "Stable Diffusion 1.x, 2.x and SDXL"
NAMES = "names"
"""The entry of a file's metadata with the names of the classes, a JSON list."""


@dataclass(frozen=True)
class ClassTokens:
    """The tokens of all classes, and how prompts are written with them.

    - `names`: the name of each class in prompts.
    - `count`: tokens of a class, 1 to `MOST_TOKENS`.
    """

    names: tuple[str, ...]
    count: int

    def spell(self, label: int) -> list[str]:
        """The tokens of a class as diffusers names several of one: `<class-3>`, `<class-3>_1`."""
        first = f"<class-{label}>"
        return [first, *(f"{first}_{number}" for number in range(1, self.count))]

    def write(self, text: str, label: int) -> str:
        """A prompt of a class with its tokens: in the place of its name, or else before the text.

        The name counts where it stands alone: as it is spelled, or if it is not in the text so, in
        capitals or not. An empty text stays empty.

        Raises DataError for a label of no class.

        ```python
        from discl.spectrum.models.class_tokens import ClassTokens

        tokens = ClassTokens(("bag", "coat"), 1)
        assert tokens.write("a photo of a coat", 1) == "a photo of a <class-1>"
        assert tokens.write("a warm jacket", 1) == "<class-1>, a warm jacket"
        ```
        """
        if not 0 <= label < len(self.names):
            raise DataError(
                f"label {label} has no tokens; the generator has those of the labels 0 to "
                f"{len(self.names) - 1}.",
                argument="label",
            )
        if not text.strip():
            return text
        words = " ".join(self.spell(label))
        for name in self._spellings(label):
            written, found = name.subn(lambda _: words, text)
            if found:
                return written
        return f"{words}, {text}"

    def named(self, text: str, label: int) -> bool:
        """Whether a text holds the name of the class."""
        return any(name.search(text) for name in self._spellings(label))

    def _spellings(self, label: int) -> list[re.Pattern[str]]:
        name = rf"(?<!\w){re.escape(self.names[label].strip())}(?!\w)"
        return [re.compile(name), re.compile(name, re.IGNORECASE)]


class GrownEmbedding(nn.Module):
    """An embedding table with further rows, whose ids begin at `first`. The table stays as it is.

    - `table`: the embedding of the text encoder.
    - `rows`: `[rows, width]`.
    """

    def __init__(self, table: nn.Embedding, rows: Tensor, first: int) -> None:
        super().__init__()
        self.table, self.rows, self.first = table, rows, first

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    @property
    def num_embeddings(self) -> int:
        return self.first + len(self.rows)

    def forward(self, ids: Tensor) -> Tensor:
        known = ids < self.first
        embedded = self.table(ids.where(known, torch.zeros_like(ids)))
        added = F.embedding((ids - self.first).clamp(min=0), self.rows)
        return torch.where(known[..., None], embedded, added.to(embedded.dtype))


def check_takes_tokens(model: Any) -> None:
    """Raises CheckpointError for a generator whose texts are not encoded by CLIP alone."""
    if not hasattr(model, "text_encoders"):
        raise CheckpointError(
            f"class tokens are for {FAMILIES}; train none for another generator.",
            argument="class_tokens",
        )


def describe_class_tokens(file: str | None) -> str:
    """What class tokens add to an image's id: their digest; empty without any.

    Raises CheckpointError for a missing file.
    """
    return "" if file is None else weights_digest(find_weights(file))


def add_class_tokens(model: Any, tokens: ClassTokens, rows: Mapping[str, Tensor]) -> None:
    """Gives a loaded generator class tokens; its texts may then hold them.

    - `model`: of Stable Diffusion 1.x, 2.x or SDXL.
    - `rows`: `{text encoder: [classes × tokens, width]}`, class after class.

    Raises CheckpointError for a tokenizer that has such tokens already.
    """
    spelled = [word for label in range(len(tokens.names)) for word in tokens.spell(label)]
    grown = []
    for encoder in model.text_encoders:
        tokenizer, table = copy.deepcopy(encoder.tokenizer), encoder.network.get_input_embeddings()
        tokenizer.add_tokens(spelled)
        ids = tokenizer.convert_tokens_to_ids(spelled)
        first = ids[0]
        if ids != list(range(first, first + len(ids))) or first > table.num_embeddings:
            raise CheckpointError(
                f"the checkpoint's tokenizer has a token '{spelled[0]}' already, or numbers its "
                "tokens with gaps, so it takes no class tokens; use another checkpoint."
            )
        embedding = GrownEmbedding(table, rows[encoder.part], first)
        encoder.network.set_input_embeddings(embedding)
        grown.append(encoder._replace(tokenizer=tokenizer))
    model.text_encoders, model.class_tokens = grown, tokens


@contextmanager
def trained_tokens(
    model: Any, names: Sequence[str], count: int
) -> Iterator[dict[str, nn.Parameter]]:
    """The trained rows of each text encoder, float32; the model is itself again afterwards.

    Every token of a class begins at the mean of the embeddings of its name's tokens. The text
    encoders are frozen meanwhile.

    - `names`: the name of each class in prompts.
    - `count`: tokens of a class; 0 trains none.

    Raises CheckpointError for a generator of another family, and DataError (`names`) for a name
    that has no tokens.
    """
    if not count:
        yield {}
        return
    check_takes_tokens(model)
    before = list(model.text_encoders)
    tables = [encoder.network.get_input_embeddings() for encoder in before]
    weights = [parameter for encoder in before for parameter in encoder.network.parameters()]
    required = [parameter.requires_grad for parameter in weights]
    rows = {
        encoder.part: nn.Parameter(_embed_names(encoder.tokenizer, table, names, count))
        for encoder, table in zip(before, tables, strict=True)
    }
    for parameter in weights:
        parameter.requires_grad_(False)
    try:
        add_class_tokens(model, ClassTokens(tuple(names), count), rows)
        yield rows
    finally:
        model.text_encoders, model.class_tokens = before, None
        for encoder, table in zip(before, tables, strict=True):
            encoder.network.set_input_embeddings(table)
        for parameter, wanted in zip(weights, required, strict=True):
            parameter.requires_grad_(wanted)


@torch.no_grad()
def _embed_names(tokenizer: Any, table: nn.Embedding, names: Sequence[str], count: int) -> Tensor:
    """`[classes × count, width]`: `count` times the mean embedding of the tokens of each name."""
    means = []
    for name in names:
        ids = tokenizer(name, add_special_tokens=False).input_ids
        if not ids:
            raise DataError(
                f"the class name {name!r:.80} has no tokens to begin at; give the class another "
                "name in prompts.",
                argument="names",
            )
        means.append(table(torch.tensor(ids, device=table.weight.device)).float().mean(0))
    return torch.stack(means).repeat_interleave(count, dim=0)


def write_prompts(
    model: Any, texts: Sequence[Sequence[str]], labels: Sequence[int]
) -> list[list[str]]:
    """The prompts of each row with the tokens of its class; tells what that changes.

    - `model`: a generator with class tokens.
    - `texts`: the plain prompts of each row; `labels`: its class.

    Raises DataError (`class_tokens`) for a text whose class tokens are cut, because it is longer
    than a text encoder reads.
    """
    tokens: ClassTokens = model.class_tokens
    plain = dict.fromkeys(
        (text, label) for each, label in zip(texts, labels, strict=True) for text in each
    )
    written = {each: tokens.write(*each) for each in plain}
    count = count_of(len(written), "prompt")
    unnamed = sum(not tokens.named(*each) for each in plain)
    if unnamed:
        logger.warning(
            f"class tokens: {unnamed:,} of {count} do not hold the name of their class; there the "
            "tokens come first"
        )
    if cut := sum(_is_cut(model, text) for text in written.values()):
        logger.warning(
            f"class tokens: {cut:,} of {count} are longer than the generator reads; their ends "
            "are cut"
        )
    return [
        [written[text, label] for text in each] for each, label in zip(texts, labels, strict=True)
    ]


def _is_cut(model: Any, text: str) -> bool:
    """Whether a text encoder does not read the end of a text. Raises DataError for class tokens."""
    cut = False
    for encoder in model.text_encoders:
        first = encoder.network.get_input_embeddings().first
        ids = encoder.tokenizer(text, verbose=False).input_ids
        if len(ids) <= encoder.length:
            continue
        cut = True
        if any(each >= first for each in ids[encoder.length - 1 :]):
            raise DataError(
                f"{shorten(text)} has {len(ids)} tokens, of which this checkpoint reads "
                f"{encoder.length}, and class tokens are among those that are cut; use fewer, or "
                "shorter prompts.",
                argument="class_tokens",
            )
    return cut


# -------------------------------------------------------------------------------------- files


def save_class_tokens(file: Path, tokens: ClassTokens, rows: Mapping[str, Tensor]) -> None:
    """Writes the tokens as safetensors: `text_encoder.<class-3>`, `[tokens, width]`, float32.

    Each tensor under its token is a state that `load_textual_inversion` of diffusers reads.
    """
    tensors = {
        f"{part}.{tokens.spell(label)[0]}": own.clone()
        for part, table in rows.items()
        for label, own in enumerate(table.detach().float().split(tokens.count))
    }
    save_tensors(tensors, file, {NAMES: json.dumps(list(tokens.names))})


def load_class_tokens(model: Any, address: str) -> None:
    """Gives a loaded generator the class tokens of a file.

    Raises CheckpointError for a generator of another family, and for a file that does not fit it.
    """
    check_takes_tokens(model)
    file = find_weights(address)
    widths = {
        encoder.part: encoder.network.get_input_embeddings().weight.shape[1]
        for encoder in model.text_encoders
    }
    with loading(file, "class tokens"):
        tokens, rows = _read(file, widths)
        moved = {part: table.to(model.device) for part, table in rows.items()}
        add_class_tokens(model, tokens, moved)


def _read(file: Path, widths: Mapping[str, int]) -> tuple[ClassTokens, dict[str, Tensor]]:
    """(tokens, rows of each text encoder) of a file; shapes are checked before values are read.

    - `widths`: of the embeddings of each text encoder of the generator.
    """
    with safe_open(file, "pt") as stored:
        found = {
            name: tuple(stored.get_slice(name).get_shape())
            for name in stored.keys()  # noqa: SIM118 (not a dict)
        }
        names = _read_names((stored.metadata() or {}).get(NAMES))
        count = next((shape[0] for shape in found.values() if len(shape) == 2), 0)
        tokens = ClassTokens(names, count)
        expected = {
            f"{part}.<class-{label}>": (count, width)
            for part, width in widths.items()
            for label in range(len(names))
        }
        for what, others in (
            ("lacks", expected.keys() - found.keys()),
            ("also holds", found.keys() - expected.keys()),
        ):
            if others:
                raise CheckpointError(
                    f"'{file}' {what} {shorten(sorted(others))}; expected are the tokens of "
                    f"{len(names)} classes for {' and '.join(widths)} of this checkpoint. They "
                    "were trained for another one, or the file is damaged."
                )
        if not 1 <= count <= MOST_TOKENS or found != expected:
            wrong = next((name for name in found if found[name] != expected[name]), min(found))
            raise CheckpointError(
                f"'{file}' has {wrong} of the shape {list(found[wrong])}; expected 1 to "
                f"{MOST_TOKENS} tokens of the same number and of the width of this checkpoint's "
                f"embeddings, {widths[wrong.split('.')[0]]}."
            )
        tensors = {name: stored.get_tensor(name) for name in found}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(f"'{file}' has values in {name} that are no finite numbers.")
    return tokens, {
        part: torch.cat([tensors[f"{part}.<class-{label}>"] for label in range(len(names))]).float()
        for part in widths
    }


def _read_names(text: str | None) -> tuple[str, ...]:
    names = None if text is None else json.loads(text)
    if not (isinstance(names, list) and names) or not all(
        isinstance(name, str) and name.strip() for name in names
    ):
        raise CheckpointError(
            "it states no list of class names, so it holds no class tokens; name a file that "
            "discl adapt wrote."
        )
    return tuple(names)
