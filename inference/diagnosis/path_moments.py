"""Mean and covariance of a posterior's whole trajectory, dense, for small programs.

    S_TT = Lambda_T^-1,   S_ts = G_t S_{t+1,s} (s > t),   S_tt = G_t S_{t+1,t+1} G_t^T + H_t

the joint Gaussian that ``sample_path`` draws from; float64, by covariances.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.inference.diagnosis.trajectories import check_smoothed, widened
from ssm_nn.inference.smoothing import Smoothed

__all__ = ["PathMoments", "path_moments"]

Array = Any

MOST_COORDINATES = 5000  # T P: the covariance takes 200 MB


class PathMoments(NamedTuple):
    """``mean`` (T, P) and ``covariance`` (T, P, T, P)."""

    mean: np.ndarray
    covariance: np.ndarray


def path_moments(posterior: Smoothed) -> PathMoments:
    """Of all tasks' weights together; O(T P^3 + T^2 P^3) time.

    Raises:
        ValueError: for more than 5,000 coordinates, and for another object.
    """
    check_smoothed(posterior)
    tasks, size = len(posterior), posterior.layout.size
    if tasks * size > MOST_COORDINATES:
        raise ValueError(
            f"posterior has {tasks} tasks of {size} weights; a dense covariance is made of up to {MOST_COORDINATES} numbers"
        )
    beliefs, infos = posterior.filtered.beliefs, posterior.filtered.infos
    covariance = np.zeros((tasks, size, tasks, size))
    covariance[-1, :, -1] = _covariance(beliefs[-1].precision)
    for t in range(tasks - 2, -1, -1):
        here = _covariance(beliefs[t].precision)
        matrix, noise = _step(infos[t + 1].moments, size)
        after = matrix @ here @ matrix.T + np.diag(noise)
        gain = np.linalg.solve(after, matrix @ here).T
        rows = np.tensordot(gain, covariance[t + 1, :, t + 1 :], 1)
        covariance[t, :, t + 1 :] = rows
        covariance[t + 1 :, :, t] = np.moveaxis(rows, 0, -1)
        both = here + gain @ (covariance[t + 1, :, t + 1] - after) @ gain.T
        covariance[t, :, t] = (both + both.T) / 2
    mean = np.stack([np.asarray(mean, np.float64) for mean in posterior.means])
    return PathMoments(mean, covariance)


def _covariance(precision: Any) -> np.ndarray:
    with jax.enable_x64(True):
        wide = widened(precision)
        return np.asarray(wide.solve(jnp.eye(wide.precision_diagonal().shape[0])))


def _step(moments: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and noise of the step into a task."""
    with jax.enable_x64(True):
        wide, identity = widened(moments), jnp.eye(size)
        turned = identity if wide.permutation is None else wide.permutation(identity)
        return np.asarray(wide.gain[:, None] * turned), np.asarray(wide.noise)
