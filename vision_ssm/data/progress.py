"""Long work over many files: a progress bar, and threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

BLOCK = 1024
Item = TypeVar("Item")
Result = TypeVar("Result")


def progress_bar(visible: bool = True) -> Progress:
    """A bar on the error stream: description, done/total, time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not visible,
    )


def tracked_map(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, description: str | None = None,
) -> Iterator[Result]:
    """``function(item)`` for each of `items`, in their order, from `workers` threads, with a bar if described.

    Pillow decodes outside of the interpreter lock, so threads do. Items are handed out in blocks: a queue of a million
    tasks would fill the memory.
    """
    with ThreadPoolExecutor(workers) as pool, progress_bar(description is not None) as progress:
        task = progress.add_task(description or "", total=len(items))
        for start in range(0, len(items), BLOCK):
            for result in pool.map(function, items[start:start + BLOCK]):
                progress.advance(task)
                yield result
