"""A progress bar for active learning: batches of labels, and what the test points say."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["LabellingBar"]


class LabellingBar:
    """A bar on the terminal; ``with LabellingBar(20) as bar: learner.run(oracle, 20, progress=bar)``.

    Args:
        total: number of batches.
        description: in front of the bar.
        console: where it is drawn.
    """

    def __init__(self, total: int, description: str = "labelling", console: Console | None = None):
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

    def __call__(self, done: int, num_labelled: int, scores: dict[str, float]) -> None:
        """After a batch."""
        words = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self._progress.update(self._task, completed=done, words=f"{num_labelled} labels  {words}")
