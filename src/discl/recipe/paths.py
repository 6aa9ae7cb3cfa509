"""Which keys of a recipe hold a file or a folder, and which hold texts.

A pattern is a key with dots, in which `*` stands for any one key. It covers the keys below it, too.
Items of a list have the key of their list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

from pydantic import AfterValidator

from ..errors import RecipeError, shorten
from ..utils.yaml_text import ITEM

TUNED = ("compare.tune.space", "compare.tune.methods.*")
CANDIDATES = "pilot.candidates.*"
SPACES = (*TUNED, CANDIDATES)
"""Mappings whose keys hold dots themselves, such as `train.optimizer.lr`."""
METHODS = ("methods.*", *TUNED)
TRAIN = ("train", "compare.tune.train", *(f"{method}.train" for method in METHODS))

LISTS = ("data.files",)
"""Files that are looked up in `data.root` before anywhere else."""
_GENERATION = (
    "prompts.phrases",
    "prompts.captions.checkpoint",
    "prompts.settings.captioner.checkpoint",
    "spectrum.checkpoint",
    "spectrum.config",
    "spectrum.loras.path",
    "filter.checkpoint",
)
PATHS = (
    *LISTS,
    "data.root",
    "data.images",
    "data.long_tail.index",
    "retrieval.archive",
    "retrieval.images",
    *_GENERATION,
    *(f"{CANDIDATES}.{key}" for key in _GENERATION),
    "runtime.store",
    "audit.features",
    *(f"{train}.model.checkpoint" for train in TRAIN),
)
"""Texts that may name a file or folder of this machine."""
_SERVERS = ("prompts.endpoint.model", "prompts.settings.endpoint.model")
FOREIGN = (
    *_SERVERS,
    *(f"{CANDIDATES}.{key}" for key in _SERVERS),
    "loop.policy",
    *(f"{method}.{key}" for method in METHODS for key in ("objective", "system")),
)
"""Texts that another program reads, such as a server or a plugin. They may name a file as well."""
_GENERATION_TEXTS = ("prompts.templates", "prompts.names", "filter.negatives")
TEXTS = (
    *_GENERATION_TEXTS,
    *(f"{CANDIDATES}.{key}" for key in _GENERATION_TEXTS),
    "data.files",
    "data.splits",
    "data.columns",
    "pilot.mixture",
    "retrieval.columns",
    "data.long_tail.class_order",
    "hard.exclude",
    "compare.rows",
    "runtime.loggers",
    *(f"{train}.{key}" for train in TRAIN for key in ("augment", "model.templates")),
)
"""Lists and mappings of texts, such as class names, whose values YAML must not take for numbers."""


def matches(keys: Sequence[str], patterns: Iterable[str]) -> bool:
    """Whether a value at these keys is covered by one of the patterns."""
    return _matches(tuple(keys), tuple(patterns))


@lru_cache(4096)
def _matches(keys: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    names = _names([key for key in keys if key != ITEM])
    return any(_covers(pattern.split("."), names) for pattern in patterns)


def _covers(pattern: Sequence[str], names: Sequence[str]) -> bool:
    return len(pattern) <= len(names) and all(
        wanted in ("*", name) for wanted, name in zip(pattern, names, strict=False)
    )


def _names(keys: list[str]) -> list[str]:
    """The keys, with those of a search space split at their dots."""
    for space in SPACES:
        parts = space.split(".")
        if len(keys) > len(parts) and _covers(parts, keys):
            return [*keys[: len(parts)], *keys[len(parts)].split("."), *keys[len(parts) + 1 :]]
    return keys


def map_paths(
    tree: Mapping[str, Any],
    change: Callable[[str, tuple[str, ...]], str],
    patterns: Sequence[str] = PATHS,
) -> dict[str, Any]:
    """A copy of a recipe's plain tree, with `change(text, keys)` in place of each covered text.

    The tree need not be a valid recipe.
    """

    def changed(value: Any, keys: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: changed(each, (*keys, str(key))) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [changed(each, keys) for each in value]
        return change(value, keys) if isinstance(value, str) and matches(keys, patterns) else value

    return {key: changed(value, (str(key),)) for key, value in tree.items()}


def check_path(value: str) -> str:
    """A text that may name a file or folder. Raises RecipeError where no file system takes it."""
    longest = max((len(name.encode()) for name in value.split("/")), default=0)
    if longest > 255 or len(value.encode()) > 4096:
        raise RecipeError(
            f"got {shorten(value)}, which has a name of {longest} bytes; a file system allows "
            "names of 255 bytes and paths of 4,096 bytes at most."
        )
    return value


PathOrName = Annotated[str, AfterValidator(check_path)]
"""A file or folder of this machine, or something elsewhere: on the hub, embedded, at a URL."""
