"""A progress bar for a stream of batches: examples a second, running accuracy, epistemic uncertainty."""

from __future__ import annotations

import numpy as np
from rich.console import Console

from ssm_nn.inference.batch_bar import BatchBar
from ssm_nn.inference.mean_field.states import MeanFieldInfo, MeanFieldState

__all__ = ["LearningBar"]

_MEMORY = 0.9  # of the running means, a block


class LearningBar(BatchBar):
    """A bar on the terminal; ``with LearningBar(len(batches)) as bar: engine.run(state, batches, progress=bar)``.

    Accuracy and epistemic uncertainty (nats an example) are of examples met for the first time, fading by blocks.

    Args:
        total: number of batches; None where it is not known.
        description: in front of the bar.
        console: where it is drawn.
    """

    def __init__(self, total: int | None = None, description: str = "learning", console: Console | None = None):
        super().__init__(total, description, console)
        self._counts = np.zeros(3)  # examples, right ones, epistemic nats
        self._examples = 0

    def __call__(self, done: int, state: MeanFieldState, info: MeanFieldInfo) -> None:
        """After a block."""
        del state
        here = np.array([np.sum(info.counted), np.sum(info.correct), np.sum(info.epistemic)], float)
        self._counts = _MEMORY * self._counts + here
        self._examples += int(here[0])
        words = f"{self._examples / self._elapsed:,.0f} examples/s" if self._elapsed > 0 else ""
        if np.all(np.isfinite(self._counts)) and self._counts[0]:
            accuracy, epistemic = self._counts[1:] / self._counts[0]
            words += f"  accuracy {accuracy:.1%}  epistemic {epistemic:.3f} nats"
        self._advance(done, words)
