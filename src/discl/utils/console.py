"""Progress bars and messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..escaping import message, one_line

console = Console(stderr=True, highlight=False, emoji=False)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` units; the function that it hands out takes the number of finished ones."""
    what = one_line(what)
    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
    if not console.is_terminal:
        console.print(f"{what}: {total} done", markup=False, soft_wrap=True)


def say(text: str) -> None:
    """A line for the person who runs this, on standard error, whatever names it holds."""
    console.print(message(text), markup=False, soft_wrap=True)
