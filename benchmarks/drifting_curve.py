"""Readings of a curve whose height walks at random: ``y = h_t sin(1.5 x) + 0.3 x + noise``, x uniform on [-2, 2]."""

from __future__ import annotations

import numpy as np

__all__ = ["NOISE", "visits_of"]

NOISE = 0.15  # standard deviation of a reading
_STEP = 0.25  # standard deviation of the height's step
Visit = dict[str, np.ndarray]


def visits_of(seed: int, num_visits: int, readings: int, new: int) -> tuple[list[Visit], list[Visit]]:
    """What is learnt, and ``new`` further readings a visit; x (N, 1), y (N,)."""
    random = np.random.default_rng(seed)
    height = 1.0 + np.cumsum(random.normal(0, _STEP, num_visits))

    def read(t: int, count: int) -> Visit:
        x = random.uniform(-2, 2, count).astype("float32")
        y = height[t] * np.sin(1.5 * x) + 0.3 * x + NOISE * random.normal(size=count)
        return {"x": x[:, None], "y": y.astype("float32")}

    return [read(t, readings) for t in range(num_visits)], [read(t, new) for t in range(num_visits)]
