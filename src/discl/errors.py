"""Every error that discl raises on purpose.

    DisclError
    ├── RecipeError       a key or value of the recipe is wrong
    ├── DataError         images, labels or splits are missing, unreadable or contradictory
    ├── CheckpointError   a checkpoint is incomplete, of the wrong family, pickled, or too large
    ├── EndpointError     a server that writes prompts is down, refuses, or sends invalid text
    ├── StoreError        stored images or scores cannot be read or written
    ├── RunError          a run folder has another recipe, or an input of a stage is missing
    │   ├── BrokenFileError   a file of a run folder is missing, cut off, empty or of another kind
    │   └── WriteError        a file cannot be written, for example on a full or read-only disk
    └── TrainingError     training cannot continue: no finite loss, no sample, foreign checkpoint

Each message gives the value, what is allowed, and how to fix it. `DisclError.argument` names the
argument with the wrong value. Any other exception is a bug.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any


class DisclError(Exception):
    """Base of all errors that a user can fix.

    - `message`: the value got, what is allowed, and how to fix it.
    - `argument`: the argument with the wrong value, or None. It is printed before the message.
      A function names its own argument; a caller with other names uses `arguments_named`.

    ```python
    import discl

    try:
        discl.make_strategy("diverse-to-specific", levels=[0, 50], curriculum_epochs=1)
    except discl.DisclError as error:
        assert error.argument == "curriculum_epochs"
    ```
    """

    def __init__(self, message: str = "", *, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument

    def __str__(self) -> str:
        text = super().__str__()
        return f"{self.argument}: {text}" if self.argument else text


@contextmanager
def arguments_named(default: str | None = None, /, **names: str) -> Iterator[None]:
    """Errors raised inside name these arguments as the caller knows them.

    - `default`: what an error is about that names no argument.

    ```python
    with arguments_named(levels="spectrum.levels"):
        check_levels(levels, num_inference_steps)
    ```
    """
    try:
        yield
    except DisclError as error:
        error.argument = names.get(error.argument or "", error.argument or default)
        raise


class RecipeError(DisclError, ValueError):
    """A key or value of the recipe is wrong.

    It is also a ValueError, so that pydantic gathers all errors of a recipe with their keys.

    ```python
    import discl

    try:
        discl.load_recipe("fashion-lt", {"train.epochs": 0})
    except discl.RecipeError as error:
        assert "train.epochs" in str(error)
    ```
    """


class DataError(DisclError):
    """Images, labels or splits are missing, unreadable or contradict each other.

    ```python
    import discl

    try:
        discl.read_tables("no/such/folder")
    except discl.DataError as error:
        print(error)
    ```
    """


class CheckpointError(DisclError):
    """A checkpoint is incomplete, of the wrong family, pickled, or too large for the memory.

    ```python
    import discl

    try:
        discl.describe_generator("./no/such/folder")
    except discl.CheckpointError as error:
        print(error)
    ```
    """


class EndpointError(DisclError):
    """A server that writes prompts is down, refuses, or sends invalid text."""


class StoreError(DisclError):
    """Stored images or scores cannot be read or written.

    ```python
    import discl

    try:
        discl.SpectrumDataset.of_shards("no/such/folder", "photos")
    except discl.StoreError as error:
        print(error)
    ```
    """


class RunError(DisclError):
    """A run folder belongs to another recipe, or an input of a stage is missing.

    ```python
    import discl

    try:
        discl.SpectrumDataset.of_run("no/such/run")
    except discl.RunError as error:
        print(error)
    ```
    """


class BrokenFileError(RunError):
    """A file of a run folder is missing, cut off, empty, or of another kind; `path` names it."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class WriteError(RunError, OSError):
    """A file cannot be written. It is also an OSError.

    - `path`: the file.
    - `said`: the reason, in the system's words.
    - `errno`: the system's error number, or None.
    """

    def __init__(self, path: Path, said: str, remedy: str = "", number: int | None = None) -> None:
        super().__init__(f"cannot write {path}: {said}. {remedy}".rstrip())
        self.path, self.said, self.remedy, self.errno = path, said, remedy, number

    def __reduce__(self) -> tuple[type[WriteError], tuple[Path, str, str, int | None]]:
        return type(self), (self.path, self.said, self.remedy, self.errno)


class TrainingError(DisclError):
    """Training cannot continue: no sample to draw, no finite loss, or a foreign checkpoint.

    ```python
    import discl

    dataset = discl.SpectrumDataset.of_run("runs/fashion-lt")
    try:
        discl.Curriculum(dataset, "fixed", level=1, curriculum_epochs=2)
    except discl.TrainingError as error:
        assert error.argument == "level"
    ```
    """


def shorten(value: object, most: int = 80, quoted: bool = True) -> str:
    """A value as an error shows it: as Python writes it, in about `most` characters.

    - `quoted`: whether a text keeps its quotation marks.

    A longer value loses its middle, shown as `…`.
    """
    if isinstance(value, str):
        part = _without_middle(value, most)
        return (
            repr(part)
            if quoted
            else repr(f'"{part}')[2:-1].replace("\\'", "'").replace("\\\\", "\\")
        )
    if isinstance(value, int) and abs(value) >= 10**most:
        return f"{'-' if value < 0 else ''}{hex(abs(value))[:most]}… ({value.bit_length()} bits)"
    return _without_middle(_BRIEF.repr(value), most)


def _without_middle(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-(most // 4) :]}"


class _Brief(reprlib.Repr):
    """Values as Python writes them, but only the first few hundred and to a small depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 8
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 50
        self.maxstring = self.maxlong = self.maxother = 400

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Keeps the order of the dictionary."""
        if level <= 0 and x:
            return "{...}"
        shown = [
            f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}"
            for key, value in islice(x.items(), self.maxdict)
        ]
        return f"{{{', '.join([*shown, *(['...'] if len(x) > self.maxdict else [])])}}}"


_BRIEF = _Brief()


def join_lines(lines: Sequence[str], most: int = 3500, of: int = 0) -> str:
    """The first lines of a message that fit into `most` characters, at least one, and how many more
    there are.

    - `of`: the number of all lines, if `lines` are not all.
    """
    kept: list[str] = []
    left = most
    for line in lines:
        line = line if len(line) <= most else f"{line[: most - 1]}…"
        left -= len(line) + 1
        if kept and left < 0:
            break
        kept.append(line)
    more = max(of, len(lines)) - len(kept)
    return "\n".join([*kept, *([f"… and {more} more problem{'s' * (more > 1)}."] if more else [])])


def unknown(kind: str, got: object, known: Iterable[str]) -> str:
    """Message for a name that is not in `known`; it proposes the nearest one."""
    names = sorted(known)
    text = got if isinstance(got, str) else shorten(got)
    near = difflib.get_close_matches(text[:200], names, n=1) if len(names) <= MANY else []
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{shorten(text, quoted=False)}'; known: {_listed(names)}.{hint}"


MANY = 20_000
"""With more known names, no nearest one is searched, because that takes seconds."""


def _listed(names: Sequence[str], most: int = 1200) -> str:
    """The first names that fit into `most` characters, separated by commas."""
    shown: list[str] = []
    left = most
    for name in names:
        text = shorten(name, quoted=False)
        left -= len(text) + 2
        if left < 0:
            return f"{', '.join(shown)}, … ({len(names)} in all)"
        shown.append(text)
    return ", ".join(shown)
