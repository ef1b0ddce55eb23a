"""Innovations: what each task's data were, against what the filter expected before they came.

    u_n = L_n^+ d log p(y_n | eta) / d eta   at the predicted mean, L_n L_n^T the Fisher information there
    nu_t = u^T (I + V^T Lambda'^-1 V)^-1 u,   V = J^T L          normalised innovation; chi^2 for Gaussian likelihoods

and, example by example, whether the outcome lay inside the predictive intervals. Both are judged against data drawn from the
prediction itself (weights, then data), so that examples of one task, which share their weights, are not taken as independent,
and no likelihood is taken as Gaussian. The network is linearised at the predicted mean. Tasks are independent of each other
under the program: their sums are judged too. Source of the test: Bar-Shalom, Li, Kirubarajan 2001, section 5.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import Program, StateSpace, extract
from ssm_nn.inference.batches import rows, single, with_mask
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.checks import check_count
from ssm_nn.inference.curvature import columns, factor_columns
from ssm_nn.inference.diagnosis.ahead import predicted_beliefs
from ssm_nn.inference.diagnosis.trajectories import checked_tasks
from ssm_nn.inference.predictive import class_log_probabilities
from ssm_nn.inference.smoothing import Smoothed
from ssm_nn.likelihoods import likelihood_of
from ssm_nn.tasks import Task, Tasks

__all__ = ["Innovations", "innovations"]

Array = Any

MOST_COLUMNS = 1024  # of one task's examples: the innovations' covariance is a square matrix of that size
_NUMBERS = 2**26  # of those columns: 256 MiB in float32
LEVELS = (0.5, 0.9)


@dataclass(frozen=True)
class Innovations:
    """By task; nan where a task is not judged (the first, and those without data).

    Attributes:
        statistic: (T,) nu_t, and ``expected`` (T,) its mean under the prediction.
        score: (T,) (nu - mean) / sd, mean and sd under the prediction: above 0, the data surprise more than they should.
        p_value: (T,) two-sided share of replicated data sets at least as extreme.
        coverage: level -> (T,) share of examples inside the predictive interval (for classes: the most probable set).
        coverage_score: level -> (T,) standardised like ``score``; below 0, too many lie outside.
        total_score: of the sum of nu over tasks; ``total_coverage`` and ``total_coverage_score`` by level.
    """

    statistic: np.ndarray
    expected: np.ndarray
    score: np.ndarray
    p_value: np.ndarray
    coverage: dict[float, np.ndarray]
    coverage_score: dict[float, np.ndarray]
    total_score: float
    total_coverage: dict[float, float]
    total_coverage_score: dict[float, float]


def innovations(
    posterior: Smoothed,
    tasks: Tasks | Iterable[Task | Mapping[str, Any]],
    *,
    num_samples: int = 400,
    key: int = 0,
) -> Innovations:
    """Judge every prediction of the filter from the second task on; the first would be judged against the prior.

    Args:
        posterior: what ``LaplaceFilter.smooth`` returned.
        tasks: its tasks; of a task with more than 1,024 columns (examples times outputs), evenly chosen examples are judged.
        num_samples: replicated data sets, at least 100.
        key: a seed.

    Raises:
        ValueError: tasks of another posterior, too few draws.
    """
    check_count(100, num_samples=num_samples)
    check_count(0, key=key)
    stack, _ = checked_tasks(posterior, tasks)
    filtered, judged = posterior.filtered, {}
    ahead = predicted_beliefs(filtered, stack)
    chosen = _chosen(posterior, stack)
    for t in range(1, len(stack)):
        task = with_mask(stack.at(t))
        if not bool(np.any(task.mask)):
            continue
        task = rows(task, chosen)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(key), t), num_samples)
        found = jax.tree.map(np.asarray, _judge(filtered.program, filtered.hypers, ahead[t], task, keys))
        judged[t] = _Task(found, np.asarray(task.mask), np.random.default_rng([key, t]))
    return _summary(judged, len(stack))


class _Task:
    """One task's numbers: nu of the data (first) and of the replicates, and which outcomes lay how far out, (1 + S, N)."""

    def __init__(self, found: Any, mask: np.ndarray, rng: np.random.Generator):
        statistics, sites = found
        self.statistics = np.asarray(statistics, np.float64)
        places = [_extremeness(site, rng) for site in sites.values()]
        joined = np.concatenate([place[:, mask].reshape(len(place), -1) for place in places], axis=1)
        self.inside = {level: np.sum(joined <= level, axis=1) for level in LEVELS}
        self.count = joined.shape[1]


def _extremeness(site: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """By outcome, the mass of the outcomes that are more central (or, for classes, more probable): uniform if all is well."""
    values, by_class = site["values"], site["by_class"]  # (1 + S, N, ...)
    noise = rng.uniform(size=values.shape)
    if by_class is not None:
        p = np.exp(np.asarray(by_class, np.float64))  # (N, ..., K)
        own = np.take_along_axis(np.broadcast_to(p, (len(values), *p.shape)), values[..., None].astype(int), -1)
        more = np.sum(np.where(p > own, p, 0.0), axis=-1)
        equal = np.sum(np.where(p == own, p, 0.0), axis=-1)
        return more + noise * equal
    drawn = np.sort(values[1:], axis=0)
    flat, pool = values.reshape(len(values), -1), drawn.reshape(len(drawn), -1)
    below = np.stack([np.searchsorted(pool[:, n], flat[:, n], side="left") for n in range(flat.shape[1])], axis=1)
    upto = np.stack([np.searchsorted(pool[:, n], flat[:, n], side="right") for n in range(flat.shape[1])], axis=1)
    # the data are no draw of the pool, replicates are
    outside = np.zeros((len(values), 1))
    outside[0] = 1
    place = (below + noise.reshape(below.shape) * (upto - below + outside)) / (len(drawn) + outside)
    return np.abs(2 * place - 1).reshape(values.shape)


def _chosen(posterior: Smoothed, stack: Tasks) -> Array:
    """Indices of the examples that are judged."""
    task = with_mask(stack.at(0))
    found: list[int] = []

    def trace(task: Task, hypers: Any) -> None:
        found.append(factor_columns(extract(posterior.program, task, hypers), task))

    jax.eval_shape(trace, task, posterior.hypers)
    most = min(MOST_COLUMNS, _NUMBERS // posterior.layout.size)
    count = max(min(most // found[0], task.num_examples), 1)
    return jnp.asarray(np.linspace(0, task.num_examples - 1, count).round().astype(int))


@partial(jax.jit, static_argnums=0)
def _judge(program: Program, hypers: Any, predicted: Belief, task: Task, keys: Array) -> tuple[Array, Any]:
    """nu of the data and of every replicate (1 + S,), and by site their values and, for classes, log probabilities."""
    space = extract(program, task, hypers)
    mean, dtype = predicted.mean, predicted.mean.dtype

    def of_batch(theta: Array) -> Array:
        return jax.vmap(lambda d, m: space.outputs(theta, single(task, d, m)))(task.data, task.mask)

    at_mean, push = jax.linearize(of_batch, mean)
    new = columns(space, mean, task)  # (P, N C)
    seen = jnp.any(new != 0, axis=0)  # what the weights do not move says nothing of them
    spread = jnp.eye(new.shape[1], dtype=dtype) + new.T @ predicted.precision.solve(new)
    root = jnp.linalg.cholesky(spread)

    def of_example(d: Any, m: Array) -> Array:
        return jnp.linalg.pinv(space.output_factor(mean, single(task, d, m)).astype(dtype))

    inverse = jax.vmap(of_example)(task.data, task.mask)  # (N, C, K)

    def statistic(values: Mapping[str, Array]) -> Array:
        slope = jax.grad(lambda eta: _log_likelihood(space, mean, task, eta, values))(at_mean)
        u = jnp.where(seen, jnp.einsum("nck,nk->nc", inverse, slope).ravel(), 0.0)
        return jnp.sum(jnp.square(jax.scipy.linalg.solve_triangular(root, u, lower=True)))

    def replicate(key: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        weights_key, data_key = jax.random.split(key)
        eta = at_mean + push(predicted.precision.sample(weights_key))
        return _drawn(space, mean, task, eta, data_key)

    values, by_class = jax.lax.map(replicate, keys)
    actual = _observed(space, mean, task)
    both = {name: jnp.concatenate([actual[name][None].astype(v.dtype), v]) for name, v in values.items()}
    statistics = jax.lax.map(statistic, both)
    sites = {}
    for name, value in both.items():
        mixture = by_class.get(name)
        if mixture is not None:
            mixture = jax.nn.logsumexp(mixture, axis=0) - jnp.log(mixture.shape[0])
        sites[name] = {"values": value, "by_class": mixture}
    return statistics, sites


def _each_site(space: StateSpace, mean: Array, example: Task) -> list[tuple[str, Any, slice, tuple[int, ...]]]:
    """Name, likelihood, slice and shape of each site's outputs for one example."""
    found, start = [], 0
    for name, site in space.observe(mean, example).items():
        likelihood = likelihood_of(site.distribution)
        width = int(np.prod(likelihood.outputs.shape))
        found.append((name, likelihood, slice(start, start + width), likelihood.outputs.shape))
        start += width
    return found


def _log_likelihood(space: StateSpace, mean: Array, task: Task, eta: Array, values: Mapping[str, Array]) -> Array:
    def one(eta: Array, value: Any, d: Any, m: Array) -> Array:
        example = single(task, d, m)
        parts = [
            jnp.sum(likelihood.rebuild(eta[part].reshape(shape)).log_prob(value[name][None]))
            for name, likelihood, part, shape in _each_site(space, mean, example)
        ]
        return jnp.where(m, sum(parts), 0.0)

    return jnp.sum(jax.vmap(one)(eta, dict(values), task.data, task.mask))


def _drawn(
    space: StateSpace, mean: Array, task: Task, eta: Array, key: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    def one(eta: Array, key: Array, d: Any, m: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        values, by_class = {}, {}
        for name, likelihood, part, shape in _each_site(space, mean, single(task, d, m)):
            made = likelihood.rebuild(eta[part].reshape(shape))
            key, own = jax.random.split(key)
            values[name] = made.sample(own)[0]
            probabilities = class_log_probabilities(made)
            if probabilities is not None:
                by_class[name] = probabilities[0]
        return values, by_class

    return jax.vmap(one)(eta, jax.random.split(key, eta.shape[0]), task.data, task.mask)


def _observed(space: StateSpace, mean: Array, task: Task) -> dict[str, Array]:
    def one(d: Any, m: Array) -> dict[str, Array]:
        sites = space.observed(mean, single(task, d, m))
        return {name: jnp.asarray(site.value)[0] for name, site in sites.items()}

    return jax.vmap(one)(task.data, task.mask)


def _summary(judged: dict[int, _Task], num_tasks: int) -> Innovations:
    def by_task(number: Any) -> np.ndarray:
        return np.array([number(judged[t]) if t in judged else np.nan for t in range(num_tasks)])

    total = sum((task.statistics for task in judged.values()), np.zeros(1))
    inside = {level: sum((task.inside[level] for task in judged.values()), np.zeros(1)) for level in LEVELS}
    count = sum(task.count for task in judged.values())
    return Innovations(
        statistic=by_task(lambda task: task.statistics[0]),
        expected=by_task(lambda task: task.statistics[1:].mean()),
        score=by_task(lambda task: _score(task.statistics)),
        p_value=by_task(lambda task: _p_value(task.statistics)),
        coverage={level: by_task(lambda task, at=level: task.inside[at][0] / task.count) for level in LEVELS},
        coverage_score={level: by_task(lambda task, at=level: _score(task.inside[at])) for level in LEVELS},
        total_score=_score(total),
        total_coverage={level: float(inside[level][0] / count) if count else np.nan for level in LEVELS},
        total_coverage_score={level: _score(inside[level]) for level in LEVELS},
    )


def _score(values: np.ndarray) -> float:
    """The first against the rest."""
    if len(values) < 2:
        return float("nan")
    # a replicate that never varies (one class has all the mass) leaves nothing to divide by
    return float((values[0] - values[1:].mean()) / max(values[1:].std(), 1e-6 * (1 + abs(values[1:].mean()))))


def _p_value(values: np.ndarray) -> float:
    rest = values[1:]
    upper, lower = np.sum(rest >= values[0]), np.sum(rest <= values[0])
    return float(min(1.0, 2 * (1 + min(upper, lower)) / (1 + len(rest))))
