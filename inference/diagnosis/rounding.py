"""How much of a belief is rounding: its read-outs in its own precision against the same in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.diagnosis.trajectories import widened
from ssm_nn.inference.smoothing import Smoothed
from ssm_nn.precision import permuted

__all__ = ["Rounding", "rounding"]

Array = Any


class Rounding(NamedTuple):
    """By task.

    Attributes:
        variance: (T,) largest relative error of a weight's variance; infinite where one is not positive or not finite.
        step: (T,) the same of the variances after the step into the next task; nan for the last.
        dtype: of the beliefs.
    """

    variance: np.ndarray
    step: np.ndarray
    dtype: str


def rounding(posterior: Smoothed) -> Rounding:
    """Of the filtered beliefs as they are stored: both sides read the same numbers, so that only arithmetic differs."""
    filtered = posterior.filtered
    variances, steps = [], []
    for t, belief in enumerate(filtered.beliefs):
        own = Belief(belief.mean, belief.precision)
        later = filtered.infos[t + 1].moments if t + 1 < len(filtered) else None
        made = [np.asarray(part, np.float64) for part in _read(own, later)]
        with jax.enable_x64(True):
            exact = [np.asarray(part) for part in _read(widened(own), None if later is None else widened(later))]
        variances.append(_relative(made[0], exact[0]))
        steps.append(np.nan if later is None else _relative(made[1], exact[1]))
    return Rounding(np.array(variances), np.array(steps), str(filtered.beliefs[0].mean.dtype))


@jax.jit
def _read(belief: Belief, moments: Any) -> tuple[Array, ...]:
    variance = belief.precision.variance()
    if moments is None:
        return (variance,)
    return variance, permuted(belief.precision, moments).predict(moments).variance()


def _relative(found: np.ndarray, exact: np.ndarray) -> float:
    if not (np.isfinite(found).all() and (found > 0).all() and np.isfinite(exact).all() and (exact > 0).all()):
        return float("inf")
    return float(np.max(np.abs(found / exact - 1)))
