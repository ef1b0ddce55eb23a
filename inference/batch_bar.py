"""A progress bar on the terminal whose last column is words about what was learnt so far."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["BatchBar"]


class BatchBar:
    """Shown while a ``with`` block runs; a subclass is called after each step, and says how far it is by ``_advance``.

    Args:
        total: number of steps; None where it is not known.
        description: in front of the bar.
        console: where it is drawn.
    """

    def __init__(self, total: int | None, description: str, console: Console | None):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task(description, total=total, words="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @property
    def _elapsed(self) -> float:
        """Seconds since the bar was begun."""
        return self._progress.tasks[self._task].elapsed or 0.0

    def _advance(self, done: int, words: str) -> None:
        self._progress.update(self._task, completed=done, words=words)
