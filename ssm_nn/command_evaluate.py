"""Beliefs on the held-out examples of every task: the rows of metrics.csv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ssm_nn.extraction import Layout
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.metrics import accuracy, brier, ece, forgetting, nll
from ssm_nn.inference.predictive import Linearised, predict_from
from ssm_nn.models.streams import TaskStream
from ssm_nn.networks import as_network
from ssm_nn.tasks import Task

__all__ = ["LAST", "LEARNT", "MATRIX", "SMOOTHED", "Evaluator", "Row"]

Array = Any

# the three views, and all pairs of a belief and a task
LEARNT, SMOOTHED, LAST, MATRIX = "just learnt", "smoothed", "last", "matrix"

# view, learnt, task, metric, value: the columns of metrics.csv after the method's own
Row = tuple[str, int | str, int | str, str, float]

SHOWN = 6  # examples of each kind in the report

_METRICS = {"accuracy": accuracy, "nll": nll, "ece": ece, "brier": brier}


class Evaluator:
    """Judges weights and beliefs on the test tasks of one stream.

    Args:
        network: the pair (apply, params) of the program.
        layout: how weights lie in a vector.
        draws: of an averaged prediction.
    """

    def __init__(self, network: Any, layout: Layout, program: Any, draws: int):
        bind = as_network(network).bind
        name = layout.sites[0].network

        def outputs(theta: Array, x: Array) -> Array:
            return bind(layout.arrays(theta)[name])(x)

        def linear(centre: Array, theta: Array, x: Array) -> Array:
            at_centre, moved = jax.jvp(lambda w: outputs(w, x), (centre,), (theta - centre,))
            return jax.nn.softmax(at_centre + moved)

        self._through_network = jax.jit(lambda theta, x: jax.nn.softmax(outputs(theta, x)))
        self._linear = jax.jit(linear)
        self._program = program
        self._method = Linearised(draws)

    def at_mean(self, mean: Array, task: Task, centre: Array | None = None) -> np.ndarray:
        """Class probabilities (N, K) at the weights ``mean``, by the network linearised at ``centre`` where it is given.

        A smoothed mean belongs to the filter's linear model of its task: its centre is the filter's mean.
        """
        x = task["x"]
        return np.asarray(self._through_network(mean, x) if centre is None else self._linear(centre, mean, x))

    def averaged(self, belief: Belief, hypers: Any, task: Task, key: int) -> tuple[np.ndarray, np.ndarray]:
        """Class probabilities (N, K) averaged over the belief, and the epistemic part of their entropy (N,)."""
        found = predict_from(self._program, hypers, belief, task, method=self._method, key=key)["y"]
        assert found.probabilities is not None  # the program's likelihood is categorical
        assert found.epistemic is not None
        return found.probabilities, found.epistemic

    def matrix(self, means: Sequence[Array], stream: TaskStream) -> np.ndarray:
        """A (T, T): accuracy on task j after learning task i."""
        return np.array([[accuracy(self.at_mean(mean, task), task["y"]) for task in stream.test] for mean in means])


def matrix_rows(matrix: np.ndarray) -> list[Row]:
    """Every entry of the accuracy matrix, and the forgetting that it shows."""
    rows: list[Row] = [
        (MATRIX, i, j, "accuracy", float(value)) for i, line in enumerate(matrix) for j, value in enumerate(line)
    ]
    return [*rows, (MATRIX, "", "", "forgetting", forgetting(matrix))]


def view_rows(
    view: str, learnt: Sequence[int], probabilities: Sequence[np.ndarray], stream: TaskStream, suffix: str = ""
) -> list[Row]:
    """All metrics of one view: ``probabilities[t]`` on task t, by a belief that has learnt the tasks up to ``learnt[t]``."""
    return [
        (view, learnt[t], t, name + suffix, metric(probabilities[t], task["y"]))
        for t, task in enumerate(stream.test)
        for name, metric in _METRICS.items()
    ]


def shown_examples(stream: TaskStream, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The least and the most uncertain examples of the middle task, by its smoothed belief."""
    t = len(stream) // 2
    sizes = np.cumsum([0, *[task.num_examples for task in stream.test]])
    inside = slice(sizes[t], sizes[t + 1])
    probabilities = arrays[f"{SMOOTHED} averaged"][inside]
    entropy = -np.sum(probabilities * np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)), axis=1)
    order = np.argsort(entropy, kind="stable")
    chosen = np.concatenate([order[:SHOWN], order[-SHOWN:]])
    return {
        "shown task": np.array(t),
        "shown x": stream.test[t]["x"][chosen],
        "shown y": stream.test[t]["y"][chosen],
        "shown probabilities": probabilities[chosen],
        "shown epistemic": arrays[f"{SMOOTHED} epistemic"][inside][chosen],
    }
