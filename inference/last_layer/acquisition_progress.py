"""A progress bar for active learning: batches of labels, and what the test points say."""

from __future__ import annotations

from rich.console import Console

from ssm_nn.inference.batch_bar import BatchBar

__all__ = ["LabellingBar"]


class LabellingBar(BatchBar):
    """A bar on the terminal; ``with LabellingBar(20) as bar: learner.run(oracle, 20, progress=bar)``.

    Args:
        total: number of batches.
        description: in front of the bar.
        console: where it is drawn.
    """

    def __init__(self, total: int, description: str = "labelling", console: Console | None = None):
        super().__init__(total, description, console)

    def __call__(self, done: int, num_labelled: int, scores: dict[str, float]) -> None:
        """After a batch."""
        words = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self._advance(done, f"{num_labelled} labels  {words}")
