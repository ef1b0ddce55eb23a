"""Exact beliefs of a linear-Gaussian task sequence by one dense joint Gaussian; numpy alone, no recursion over time.

    theta_0 ~ N(m, C),   theta_t = A_t theta_{t-1} + b_t + N(0, Q_t),   y_t = H_t theta_t + N(0, R_t)

All weights are stacked into one vector (T P,), all data into another, and the one is conditioned on the other.
"""

from typing import NamedTuple

import numpy as np


class Chain(NamedTuple):
    """``steps`` (A, b, Q) into tasks 1 .. T-1; ``data`` (H, y, R) of tasks 0 .. T-1, None for a task without data."""

    mean: np.ndarray
    covariance: np.ndarray
    steps: list
    data: list


class Joint(NamedTuple):
    """Moments of the path (T, P), (T, P, T, P), and the log density of the data."""

    mean: np.ndarray
    covariance: np.ndarray
    log_evidence: float


def prior(chain):
    """Mean (T, P) and covariance (T, P, T, P) of the path before any data."""
    tasks, size = len(chain.steps) + 1, len(chain.mean)
    # the path is linear in what drives it, theta_0 and the noises
    drive = np.zeros((tasks, size, tasks, size))
    mean, noises = np.zeros((tasks, size)), np.zeros((tasks, size, tasks, size))
    drive[0, :, 0], mean[0], noises[0, :, 0] = np.eye(size), chain.mean, chain.covariance
    for t, (matrix, shift, noise) in enumerate(chain.steps, 1):
        drive[t] = np.tensordot(matrix, drive[t - 1], 1)
        drive[t, :, t] = np.eye(size)
        mean[t], noises[t, :, t] = matrix @ mean[t - 1] + shift, noise
    flat = drive.reshape(tasks * size, -1)
    return mean, (flat @ noises.reshape(flat.shape) @ flat.T).reshape(drive.shape)


def condition(chain, up_to=None):
    """The path given the data of tasks 0 .. ``up_to``, by default all."""
    mean, covariance = prior(chain)
    tasks, size = mean.shape
    stop = tasks if up_to is None else up_to + 1
    seen = [t for t in range(stop) if chain.data[t] is not None]
    if not seen:
        return Joint(mean, covariance, 0.0)
    value = np.concatenate([chain.data[t][1] for t in seen])
    design, noise, start = np.zeros((len(value), tasks, size)), np.zeros((len(value), len(value))), 0
    for t in seen:
        rows = slice(start, start + len(chain.data[t][1]))
        design[rows, t], noise[rows, rows], start = chain.data[t][0], chain.data[t][2], rows.stop
    design = design.reshape(len(value), -1)
    flat, residual = covariance.reshape(tasks * size, -1), value - design @ mean.ravel()
    spread = design @ flat @ design.T + noise
    gain = np.linalg.solve(spread, design @ flat).T
    after = flat - gain @ design @ flat
    evidence = -0.5 * (residual @ np.linalg.solve(spread, residual) + np.linalg.slogdet(2 * np.pi * spread)[1])
    return Joint(
        mean + (gain @ residual).reshape(mean.shape), (after + after.T).reshape(covariance.shape) / 2, float(evidence)
    )


def of_task(joint, t):
    """Mean (P,) and covariance (P, P) of one task's weights."""
    return joint.mean[t], joint.covariance[t, :, t]
