"""A one-dimensional regression stream whose function drifts by a known random walk.

The function is linear in known features, so the exact posterior is a Kalman filter's and smoother's.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from ssm_nn.models.streams import TaskStream
from ssm_nn.tasks import Task

__all__ = ["DriftingRegression", "drifting_regression"]

INTERVAL = (-1.0, 1.0)


@dataclass(frozen=True, eq=False)
class DriftingRegression:
    """The stream, and what made it: f_t(x) = features(x) @ weights[t].

    Attributes:
        stream: tasks with "x" float32 (N, 1) and "y" float32 (N,), and the context {"time": float32, t}.
        weights: (T, J), w_0 ~ N(0, I), w_t = w_{t-1} + drift * N(0, I).
        drift: standard deviation of a weight's step from one task to the next.
        noise: standard deviation of y about f_t(x).
    """

    stream: TaskStream
    weights: Float[np.ndarray, "task feature"]
    drift: float
    noise: float

    def features(self, x: ArrayLike) -> Float[np.ndarray, "n feature"]:
        """phi_j(x) = exp(-((x - c_j) / s)^2 / 2): J centres c evenly over [-1, 1], s apart; x is (N,) or (N, 1)."""
        centres = np.linspace(*INTERVAL, self.weights.shape[1])
        width = centres[1] - centres[0]
        return np.exp(-0.5 * ((np.asarray(x, np.float64).reshape(-1, 1) - centres) / width) ** 2)

    def truth(self, t: int, x: ArrayLike) -> Float[np.ndarray, " n"]:
        """f_t at the points x, (N,) or (N, 1)."""
        return self.features(x) @ self.weights[t]


def drifting_regression(
    num_tasks: int = 10,
    size: int = 20,
    seed: int = 0,
    drift: float = 0.3,
    noise: float = 0.1,
    num_features: int = 8,
) -> DriftingRegression:
    """y = f_t(x) + noise * N(0, 1) with x uniform on [-1, 1]; f_t drifts by a Gaussian random walk of its weights.

    Args:
        num_tasks: T.
        size: examples a task, N, in training and in test alike.
        seed: non-negative.
        drift: standard deviation of a weight's step between tasks; 0 for a function that stands still.
        noise: standard deviation of y about f_t(x), non-negative.
        num_features: J, at least 2.

    Raises:
        ValueError: an argument out of range.
    """
    at_least = {"num_tasks": (num_tasks, 1), "size": (size, 1), "seed": (seed, 0), "num_features": (num_features, 2)}
    for argument, (value, least) in at_least.items():
        if value < least:
            raise ValueError(f"{argument} is {value}; at least {least} is needed")
    for argument, value in {"drift": drift, "noise": noise}.items():
        if not 0 <= value < np.inf:
            raise ValueError(f"{argument} is {value}; a finite non-negative number is needed")

    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((num_tasks, num_features)) * np.where(np.arange(num_tasks) > 0, drift, 1.0)[:, None]
    settings = {"shift": "drifting regression", "num_tasks": num_tasks, "size": size, "seed": seed}
    settings |= {"drift": drift, "noise": noise, "num_features": num_features}
    train: list[Task] = []
    test: list[Task] = []
    stream = TaskStream("drifting regression", train, test, None, (1,), settings)
    made = DriftingRegression(stream, np.cumsum(steps, axis=0), drift, noise)
    for t in range(num_tasks):
        for tasks in (train, test):
            x = rng.uniform(*INTERVAL, (size, 1)).astype(np.float32)
            y = made.truth(t, x) + noise * rng.standard_normal(size)
            tasks.append(Task({"x": x, "y": y.astype(np.float32)}, {"time": np.float32(t)}))
    return made
