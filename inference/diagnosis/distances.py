"""How far a posterior is from a reference: Gaussian distances where weights are identified, functional ones elsewhere.

    KL(P || Q) = 1/2 [tr(S_Q^-1 S_P) + d^T S_Q^-1 d - k + log det S_Q / det S_P],    d = m_P - m_Q
    W2^2       = |d|^2 + tr(S_P + S_Q - 2 (S_Q^1/2 S_P S_Q^1/2)^1/2)

Weights of a network may be permuted without a change of what it computes: there, predictive distributions are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import sqrtm

from ssm_nn.inference.batches import with_mask
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.checks import check_count
from ssm_nn.inference.diagnosis.path_moments import path_moments
from ssm_nn.inference.diagnosis.trajectories import check_smoothed, paths_of_samples, widened
from ssm_nn.inference.predictive import LINEARISED, Method, Prediction, _summarise, predict
from ssm_nn.inference.predictive import _outputs as _network_outputs
from ssm_nn.inference.smoothing import Smoothed
from ssm_nn.tasks import Task, Tasks, listed_tasks

__all__ = [
    "FunctionalDistance",
    "GaussianDistance",
    "functional_distance",
    "gaussian_distance",
    "gaussian_kl",
    "gaussian_w2",
]

Array = Any


def gaussian_kl(mean: Array, covariance: Array, other_mean: Array, other_covariance: Array) -> float:
    """KL(N(mean, covariance) || N(other_mean, other_covariance)) in nats, in float64.

    Raises:
        ValueError: for a covariance that is not positive definite.
    """
    m, s, n, r = (np.asarray(part, np.float64) for part in (mean, covariance, other_mean, other_covariance))
    root, other_root = _cholesky("covariance", s), _cholesky("other_covariance", r)
    half = np.linalg.solve(other_root, root)
    shift = np.linalg.solve(other_root, m - n)
    logdets = 2 * np.sum(np.log(np.diag(other_root)) - np.log(np.diag(root)))
    return float(0.5 * (np.sum(half**2) + shift @ shift - len(m) + logdets))


def gaussian_w2(mean: Array, covariance: Array, other_mean: Array, other_covariance: Array) -> float:
    """The 2-Wasserstein distance of two Gaussians, in the units of the weights, in float64."""
    m, s, n, r = (np.asarray(part, np.float64) for part in (mean, covariance, other_mean, other_covariance))
    values, vectors = np.linalg.eigh(r)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.real(sqrtm(root @ s @ root))
    square = np.sum((m - n) ** 2) + np.trace(s) + np.trace(r) - 2 * np.trace(cross)
    return float(np.sqrt(max(square, 0.0)))


def _cholesky(name: str, matrix: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        raise ValueError(f"{name} is not positive definite: more draws than weights are needed") from None


class GaussianDistance(NamedTuple):
    """By task.

    Attributes:
        kl: (T,), KL(reference || posterior) in nats.
        w2: (T,), in the units of the weights.
        mean_error: (T,), the largest error of a mean, in the reference's standard deviations.
        sd_ratio: (T, 2), the smallest and the largest ratio of a weight's standard deviation to the reference's.
    """

    kl: np.ndarray
    w2: np.ndarray
    mean_error: np.ndarray
    sd_ratio: np.ndarray


def gaussian_distance(posterior: Smoothed, samples: Mapping[str, Array]) -> GaussianDistance:
    """A posterior against NUTS on the same program, both taken as Gaussian: for programs linear in their weights.

    Args:
        posterior: what ``LaplaceFilter.smooth`` returned.
        samples: site -> (S, T, *leaf), as ``MCMC.get_samples()`` gives them, with hyper-parameters fixed at the posterior's.

    Raises:
        ValueError: for draws of another program, or fewer than ten for each weight of a task.
    """
    paths = paths_of_samples(posterior, samples)
    if len(paths) < 10 * posterior.layout.size:
        raise ValueError(
            f"samples holds {len(paths)} draws of {posterior.layout.size} weights: too few for a covariance; at least "
            f"{10 * posterior.layout.size} are accepted"
        )
    moments = path_moments(posterior)
    rows = []
    for t in range(len(posterior)):
        mean, covariance = moments.mean[t], moments.covariance[t, :, t]
        reference = paths[:, t].mean(axis=0), np.atleast_2d(np.cov(paths[:, t].T))
        sd, other = np.sqrt(np.diag(covariance)), np.sqrt(np.diag(reference[1]))
        rows.append(
            (
                gaussian_kl(*reference, mean, covariance),
                gaussian_w2(*reference, mean, covariance),
                np.max(np.abs(mean - reference[0]) / other),
                (np.min(sd / other), np.max(sd / other)),
            )
        )
    return GaussianDistance(*(np.array(column) for column in zip(*rows, strict=True)))


class FunctionalDistance(NamedTuple):
    """Between predictive distributions, mean over a task's examples.

    Attributes:
        total_variation: (T,) in [0, 1], for class likelihoods, else nan: how much the probability of a set of labels differs.
        w2: (T,) of predictive means and variances, in the reference's standard deviations, for the others, else nan.
    """

    total_variation: np.ndarray
    w2: np.ndarray


def functional_distance(
    posterior: Smoothed,
    reference: Smoothed | Mapping[str, Array],
    tasks: Tasks | Iterable[Task | Mapping[str, Any]],
    *,
    method: Method = LINEARISED,
    key: int = 0,
) -> FunctionalDistance:
    """How differently two posteriors predict the examples of each task with their belief of that task.

    Args:
        posterior: what ``LaplaceFilter.smooth`` returned.
        reference: another posterior, or draws of NUTS by site, (S, T, *leaf), which go through the network itself.
        tasks: inputs, one task for each of the posterior's; labels are not read.
        method: of the predictions of posteriors.
        key: of their draws.

    Raises:
        ValueError: other numbers of tasks, draws of another program, or too few.
    """
    check_smoothed(posterior)
    if not isinstance(reference, Mapping):
        check_smoothed(reference, "reference")
    listed = listed_tasks(tasks)
    if len(listed) != len(posterior):
        raise ValueError(f"tasks holds {len(listed)} tasks, but the posterior has {len(posterior)}")
    paths = paths_of_samples(posterior, reference) if isinstance(reference, Mapping) else None
    if paths is not None:
        check_count(50, num_samples=len(paths))
    elif len(reference) != len(posterior):
        raise ValueError(f"reference has {len(reference)} tasks, but the posterior has {len(posterior)}")
    rows = []
    for t, task in enumerate(listed):
        if not task.data:
            rows.append((np.nan, np.nan))
            continue
        ours = predict(posterior, t, task, method=method, key=key)
        if isinstance(reference, Smoothed):
            theirs = predict(reference, t, task, method=method, key=key)
        else:
            assert paths is not None
            theirs = _of_draws(posterior, paths[:, t], task)
        counted = np.asarray(with_mask(task).mask)
        rows.append(_between(ours, theirs, counted))
    return FunctionalDistance(*(np.array(column) for column in zip(*rows, strict=True)))


def _of_draws(posterior: Smoothed, draws: np.ndarray, task: Task) -> dict[str, Prediction]:
    """Predictions with draws (S, P) of the weights through the network."""
    with jax.enable_x64(True):
        task = with_mask(widened(task))
        hypers, zero = widened(dict(posterior.hypers)), jnp.zeros(draws.shape[1])
        parts = task.context, task.data, task.mask
        outputs = _network_outputs(posterior.program, False, hypers, Belief(zero, None), jnp.asarray(draws), *parts)
        made = _summarise(posterior.program, hypers, zero, outputs, *parts)
        return {name: Prediction(**jax.tree.map(np.asarray, site)) for name, site in made.items()}


def _between(
    ours: Mapping[str, Prediction], theirs: Mapping[str, Prediction], counted: np.ndarray
) -> tuple[float, float]:
    variation, w2 = [], []
    for name, one in ours.items():
        if name not in theirs:
            raise ValueError(f"reference does not predict {name!r}, but {sorted(theirs)}: it is of another program")
        two = theirs[name]
        if one.probabilities is not None and two.probabilities is not None:
            variation.append(0.5 * np.abs(one.probabilities - two.probabilities).sum(-1)[counted].mean())
            continue
        sd, other = np.sqrt(one.variance), np.sqrt(two.variance)
        w2.append((np.sqrt((one.mean - two.mean) ** 2 + (sd - other) ** 2) / other)[counted].mean())
    return float(np.mean(variation)) if variation else np.nan, float(np.mean(w2)) if w2 else np.nan
