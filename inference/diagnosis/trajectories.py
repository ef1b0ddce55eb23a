"""Whole trajectories of a posterior, and how probable the program finds them, in float64.

    theta_T ~ N(m_T, Lambda_T^-1),  theta_t | theta_{t+1}        backward sampling: q(theta)
    log p(D, theta) = log p(theta_1 .. theta_T) + sum_t log p(D_t | theta_t)

The belief is taken as it is stored, and every density of it evaluated in float64: in float32 the rounding of a sum over tasks
and examples is as large as the tail of the importance weights. Draws are made in chunks and again from their key where they
are needed a second time, so that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import Layout, Program, describe, extract, path_distributions
from ssm_nn.inference.batches import single
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.draws import leaves_of_path
from ssm_nn.inference.map_problem import CONVERGED, NOT_CONVERGED
from ssm_nn.inference.smoothing import Smoothed, _log_density_before, _sample_before
from ssm_nn.likelihoods import likelihood_of
from ssm_nn.tasks import Task, Tasks, stack_tasks

__all__ = [
    "Trajectories",
    "check_smoothed",
    "checked_tasks",
    "example_log_likelihood",
    "log_joint",
    "paths_of_samples",
    "trajectories",
    "widened",
]

Array = Any

_NUMBERS = 2**24  # of a chunk of trajectories: 128 MiB in float64


class Trajectories(NamedTuple):
    """A chunk of draws, host arrays.

    Attributes:
        paths: (S, T, P).
        log_q: (S,), their log density under the posterior.
    """

    paths: np.ndarray
    log_q: np.ndarray


class _Chain(NamedTuple):
    """Beliefs of tasks 0 .. T-1 and the steps into tasks 1 .. T-1, stacked."""

    beliefs: Belief | None  # None where there is one task
    last: Belief
    moments: Any


def widened(tree: Any) -> Any:
    """Floating-point leaves as float64, inside ``jax.enable_x64(True)``."""

    def wide(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(wide, tree)


def _stacked(posterior: Smoothed) -> _Chain:
    """Filtered beliefs: backward sampling is exact under them."""
    beliefs, infos = posterior.filtered.beliefs, posterior.filtered.infos
    beliefs = [Belief(belief.mean, belief.precision) for belief in beliefs]
    last = widened(beliefs[-1])
    if len(beliefs) == 1:
        return _Chain(None, last, None)

    def stack(trees: Any) -> Any:
        return widened(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))

    return _Chain(stack(beliefs[:-1]), last, stack([info.moments for info in infos[1:]]))


@jax.jit
def _draw(chain: _Chain, keys: Array) -> tuple[Array, Array]:
    """Paths (S, T, P) and their log densities (S,)."""

    def one(key: Array) -> tuple[Array, Array]:
        last = chain.last
        last_key, key = jax.random.split(key)
        shift = last.precision.sample(last_key)
        size = shift.shape[0]
        density = 0.5 * (last.precision.logdet() - last.precision.quadratic(shift) - size * jnp.log(2 * jnp.pi))
        end = last.mean + shift
        if chain.beliefs is None:
            return end[None], density
        steps = chain.beliefs.mean.shape[0]

        def before(after: Array, inputs: Any) -> tuple[Array, tuple[Array, Array]]:
            belief, moments, step_key = inputs
            here = _sample_before(belief, moments, after, step_key)
            return here, (here, _log_density_before(belief, moments, here, after))

        inputs = (chain.beliefs, chain.moments, jax.random.split(key, steps))
        _, (earlier, densities) = jax.lax.scan(before, end, inputs, reverse=True)
        return jnp.concatenate([earlier, end[None]]), density + jnp.sum(densities)

    return jax.lax.map(one, keys)


def trajectories(posterior: Smoothed, num_samples: int, key: Array | int) -> Iterator[Trajectories]:
    """Draws of ``posterior`` in chunks; the same at each call with one key."""
    with jax.enable_x64(True):
        chain = _stacked(posterior)
        keys = jax.random.split(jax.random.key(key) if isinstance(key, int) else key, num_samples)
    chunk = max(min(_NUMBERS // (len(posterior) * posterior.layout.size), num_samples), 1)
    for start in range(0, num_samples, chunk):
        with jax.enable_x64(True):
            paths, log_q = (np.asarray(part) for part in _draw(chain, keys[start : start + chunk]))
        yield Trajectories(paths, log_q)


def log_joint(posterior: Smoothed, stack: Tasks, paths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log prior of every path (S,), and log likelihoods (S, T) of the tasks, in float64 at the posterior's hyper-parameters."""
    with jax.enable_x64(True):
        prior, likelihood = _log_joint(
            posterior.program, posterior.layout, widened(posterior.hypers), widened(stack), jnp.asarray(paths)
        )
        return np.asarray(prior), np.asarray(likelihood)


@partial(jax.jit, static_argnums=(0, 1))
def _log_joint(program: Program, layout: Layout, hypers: Any, stack: Tasks, paths: Array) -> tuple[Array, Array]:
    distributions = path_distributions(program, stack, hypers)

    def of_path(path: Array) -> tuple[Array, Array]:
        leaves = leaves_of_path(layout, path)
        prior = sum(distributions[name].log_prob(leaf) for name, leaf in leaves.items())

        def of_task(inputs: Any) -> Array:
            theta, *parts = inputs
            task = Task.tree_unflatten(None, tuple(parts))
            return extract(program, task, hypers).log_likelihood(theta, task)

        return jnp.asarray(prior), jax.lax.map(of_task, (path, stack.data, stack.context, stack.mask))

    return jax.lax.map(of_path, paths)


def example_log_likelihood(
    posterior: Smoothed, stack: Tasks, paths: np.ndarray, *, linearised: bool
) -> dict[str, np.ndarray]:
    """Log density of every example, site -> (S, T, N), nan where masked; an example's elements are summed.

    Under the network linearised at the filter's means, or the network itself.
    """
    with jax.enable_x64(True):
        centres = jnp.stack([belief.mean for belief in posterior.filtered.beliefs])
        found = _by_example(
            posterior.program,
            linearised,
            widened(posterior.hypers),
            widened(stack),
            widened(centres),
            jnp.asarray(paths),
        )
        return {name: np.asarray(value) for name, value in found.items()}


@partial(jax.jit, static_argnums=(0, 1))
def _by_example(
    program: Program, linearised: bool, hypers: Any, stack: Tasks, centres: Array, paths: Array
) -> dict[str, Array]:
    mask = stack.mask
    if mask is None:
        mask = jnp.ones(jax.tree.leaves(stack.data)[0].shape[:2], bool)

    def of_task(inputs: Any) -> dict[str, Array]:
        centre, drawn, data, context, counted = inputs
        task = Task.tree_unflatten(None, (data, context, counted))
        space = extract(program, task, hypers)

        def outputs_of(theta: Array) -> Array:
            return jax.vmap(lambda d, m: space.outputs(theta, single(task, d, m)))(data, counted)

        def of_example(eta: Array, d: Any, m: Array) -> dict[str, Array]:
            densities, start = {}, 0
            for name, site in space.observed(centre, single(task, d, m)).items():
                likelihood = likelihood_of(site.distribution)
                width = int(np.prod(likelihood.outputs.shape))
                part = jax.lax.dynamic_slice_in_dim(eta, start, width).reshape(likelihood.outputs.shape)
                start += width
                density = jnp.sum(likelihood.rebuild(part).log_prob(jnp.asarray(site.value)))
                densities[name] = jnp.where(m, density, jnp.nan)
            return densities

        if linearised:
            at_centre, push = jax.linearize(outputs_of, centre)
        else:
            at_centre, push = jnp.zeros(()), lambda shift: outputs_of(centre + shift)
        return jax.lax.map(lambda theta: jax.vmap(of_example)(at_centre + push(theta - centre), data, counted), drawn)

    made = jax.lax.map(of_task, (centres, jnp.swapaxes(paths, 0, 1), stack.data, stack.context, mask))
    return {name: jnp.swapaxes(value, 0, 1) for name, value in made.items()}


def paths_of_samples(posterior: Smoothed, samples: Mapping[str, Any]) -> np.ndarray:
    """Draws by site, as ``MCMC.get_samples()`` gives them, (S, T, *leaf), as paths (S, T, P).

    Raises:
        ValueError: for draws of another program.
    """
    check_smoothed(posterior)
    columns, count = [], None
    for site in posterior.layout.sites:
        if site.name not in samples:
            raise ValueError(
                f"samples have no {site.name!r}, but {sorted(samples)}: they are of another program than the posterior"
            )
        values = np.asarray(samples[site.name], np.float64)
        length = 1 if site.frozen else len(posterior)
        if values.ndim < 2 or values.shape[1:] != (length, *site.shape):
            wanted = f"(draws, {', '.join(map(str, (length, *site.shape)))})"
            raise ValueError(
                f"samples[{site.name!r}] has shape {values.shape}; {wanted} is accepted, as "
                "get_samples() gives them without group_by_chain"
            )
        count = len(values) if count is None else count
        columns.append(np.broadcast_to(values, (count, len(posterior), *site.shape)).reshape(count, len(posterior), -1))
    return np.concatenate(columns, axis=-1)


def check_smoothed(posterior: Any, name: str = "posterior") -> None:
    """Raise ValueError for what ``smooth`` did not return: a filter's run, an engine, a DataTree."""
    if not isinstance(posterior, Smoothed):
        raise ValueError(f"{name} is {type(posterior).__name__}; what engine.smooth(filtered) returns is accepted")


def checked_tasks(posterior: Smoothed, tasks: Any) -> tuple[Tasks, float]:
    """The stack of the posterior's own tasks, and how often it counted their likelihood.

    Raises:
        ValueError: another number of tasks, a program with other weights, tasks without observed values, or tasks whose log
            likelihood is not the one that the filter recorded: the posterior was made from other tasks.
    """
    check_smoothed(posterior)
    stack = stack_tasks(tasks)
    if len(stack) != len(posterior):
        raise ValueError(f"tasks holds {len(stack)} tasks, but the posterior has {len(posterior)}")
    means = np.stack([np.asarray(belief.mean, np.float64) for belief in posterior.filtered.beliefs])
    try:
        layout = describe(posterior.program, stack.at(0), posterior.hypers)
        if layout != posterior.layout:
            here, there = ([site.name for site in one.sites] for one in (layout, posterior.layout))
            raise ValueError(
                f"the posterior's program has the weights {here} for these tasks, the posterior has {there} of other names or "
                "shapes: it belongs to another program"
            )
        _, found = log_joint(posterior, stack, means[None])
    except (KeyError, TypeError) as error:
        raise ValueError(f"tasks do not fit the posterior's program: {error}") from error
    power = _power(list(posterior.filtered.infos), found[0])
    return stack, power


def _power(infos: list[Any], found: np.ndarray) -> float:
    """How often the filter counted the likelihood: its recorded log likelihoods over those of the tasks, one for all."""
    judged = [t for t, info in enumerate(infos) if info.status in (CONVERGED, NOT_CONVERGED) and found[t] != 0]
    judged = [t for t in judged if infos[t].log_likelihood != 0]
    if not judged:
        return 1.0
    recorded = np.array([infos[t].log_likelihood for t in judged])
    power = float(np.median(recorded / found[judged]))
    if abs(power - 1) < 1e-2:
        power = 1.0
    # float32 sums over a task's examples differ by less
    wrong = np.abs(recorded - power * found[judged]) > 1e-2 * (1 + np.abs(recorded))
    if wrong.any() or power <= 0:
        first = judged[int(np.argmax(wrong))]
        raise ValueError(
            f"tasks are not those the posterior was made from: at its mean, task {first} has the log likelihood "
            f"{found[first]:.6g}, and the filter recorded {infos[first].log_likelihood:.6g}"
        )
    return power
