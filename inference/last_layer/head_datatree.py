"""A head's posterior as an ArviZ DataTree, with the groups, dimensions and names of ``ssm_nn.inference.to_datatree``.

The weights W (K, D), the bias last, are ``head.weights``: one value for all tasks where the head stands still, by task where
it walks. A still head's draws are of the joint posterior, so that ``lp - log_q`` weighs them; a walking head's steps are drawn
independently from their smoothed beliefs, and there is no ``lp``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.inference.checks import check_count
from ssm_nn.inference.datatree import as_dataset
from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood
from ssm_nn.inference.last_layer.head_states import HeadState, UpdateInfo
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter
from ssm_nn.inference.last_layer.moving import smooth_head
from ssm_nn.inference.last_layer.split_conditioning import check_whole
from ssm_nn.tasks import Task, Tasks, stack_tasks

if TYPE_CHECKING:
    import xarray

__all__ = ["head_datatree"]

Array = Any
NAME = "head.weights"
AXES = [f"{NAME}_axis_0", f"{NAME}_axis_1"]
STATISTICS = ("num_points", "log_evidence", "log_likelihood", "steps", "decrement", "status", "seconds")


class _Beliefs(NamedTuple):
    """Whitened: means (T, K, D) and T covariances, one for a head that stands still."""

    means: Array
    beliefs: tuple[Any, ...]


def head_datatree(
    engine: LastLayerFilter,
    state: HeadState,
    *,
    num_samples: int = 200,
    key: Array | int = 0,
    tasks: Tasks | Iterable[Task | Mapping[str, Any]] | None = None,
    infos: Sequence[UpdateInfo] = (),
) -> xarray.DataTree:
    """The posterior of ``state``, with predictions and likelihoods where ``tasks`` are given.

    Args:
        engine: the filter.
        state: after its updates.
        num_samples: draws; chain is 1.
        key: of the draws; a whole number is taken as a seed.
        tasks: batches with inputs and labels; those of the updates, in order, for a head that walks and for ``lp``.
        infos: of the updates, for the group ``filter_stats``.

    Raises:
        ValueError: no draws; for a head that walks another number of tasks than of updates, or an engine that keeps no sites.
    """
    import xarray

    check_count(num_samples=num_samples)
    check_whole("head_datatree", engine.mesh)
    key = jax.random.key(key) if isinstance(key, int) else key
    posterior_key, prior_key, data_key = jax.random.split(key, 3)
    stack = None if tasks is None else stack_tasks(tasks)
    walks = engine.head.moving
    num_tasks = state.step if walks else 1 if stack is None else len(stack)
    if stack is not None and len(stack) != num_tasks:
        raise ValueError(
            f"tasks holds {len(stack)} tasks, but the head walked {num_tasks} steps; one a step is accepted"
        )
    made = _Beliefs(*smooth_head(engine, state)) if walks else _Beliefs(state.mean[None], (state.belief,))

    drawn, log_q = _draws(made, posterior_key, num_samples)
    scale = np.asarray(engine.head.scale)
    log_q = log_q - made.means.size * np.mean(np.log(scale))
    leaf = ["task", *AXES] if walks else AXES
    values: dict[str, dict[str, Any]] = {
        "posterior": {NAME: _leaf(drawn, walks) * scale},
        "sample_stats": {"log_q": log_q},
    }
    prior = _prior_draws(engine, len(made.beliefs), prior_key, num_samples)
    if stack is not None:
        values["prior"] = {NAME: _leaf(prior, walks) * scale}
        data = _data(engine, stack, drawn, prior, data_key)
        values |= data
        if not walks:
            density = np.nansum(data["log_likelihood"]["y"], axis=(1, 2))
            values["sample_stats"]["lp"] = density + _prior_density(engine, drawn[:, 0])
    sd = jnp.sqrt(jnp.stack([belief.variance() for belief in made.beliefs])) * scale
    values["smoothed"] = {
        f"{NAME}.{name}": np.broadcast_to(np.asarray(rows), (num_tasks, *rows.shape[1:]))
        for name, rows in (("mean", made.means * scale), ("sd", sd))
    }
    if infos:
        values["filter_stats"] = {name: [getattr(info, name) for info in infos] for name in STATISTICS}

    groups = {}
    for group, named in values.items():
        sampled = group not in ("smoothed", "filter_stats", "observed_data", "constant_data")
        arrays = {name: np.asarray(value) for name, value in named.items()}
        dims = {name: _dims(group, name, array.ndim - sampled, leaf) for name, array in arrays.items()}
        length = len(infos) if group == "filter_stats" else num_tasks
        groups[f"/{group}"] = as_dataset(arrays, dims, length, sampled=sampled)
    return xarray.DataTree.from_dict(groups)


def _leaf(drawn: Array, walks: bool) -> np.ndarray:
    return np.asarray(drawn if walks else drawn[:, 0])


def _dims(group: str, name: str, rank: int, leaf: list[str]) -> list[str]:
    if group in ("posterior", "prior"):
        return leaf
    if group == "smoothed":
        return ["task", *AXES]
    return ["task", "example"][:rank] + [f"{name}_axis_{axis}" for axis in range(rank - 2)]


def _draws(made: _Beliefs, key: Array, num_samples: int) -> tuple[Array, np.ndarray]:
    """(S, T, K, D), and their log density (S,)."""
    parts, density = [], np.zeros(num_samples)
    for mean, belief, own in zip(made.means, made.beliefs, jax.random.split(key, len(made.beliefs)), strict=True):
        off = belief.draw(own, num_samples)
        parts.append(mean + off)
        density += np.asarray(_log_density(belief.information(), off), float)
    return jnp.stack(parts, axis=1), density


@jax.jit
def _log_density(information: Any, off: Array) -> Array:
    squares = jax.lax.map(lambda v: jnp.sum(v * information.matvec(v)), off)
    return -0.5 * (information.log_determinant() + squares + off[0].size * jnp.log(2 * jnp.pi))


def _prior_draws(engine: LastLayerFilter, num_steps: int, key: Array, num_samples: int) -> Array:
    """Whitened paths (S, T, K, D) of the prior."""
    first = engine.init()
    gain, shift, noise = engine.step_moments()
    first_key, *keys = jax.random.split(key, num_steps)
    path = [first.mean + first.belief.draw(first_key, num_samples)]
    for own in keys:
        fresh = jnp.sqrt(noise) * jax.random.normal(own, path[-1].shape, path[-1].dtype)
        path.append(gain * path[-1] + shift + fresh)
    return jnp.stack(path, axis=1)


def _prior_density(engine: LastLayerFilter, drawn: Array) -> np.ndarray:
    """Of W for draws (S, K, D) of a head that stands still."""
    off = np.asarray(drawn - engine.prior_mean, float)
    scale = np.asarray(engine.head.scale, float)
    return np.sum(-0.5 * (np.square(off) + np.log(2 * np.pi)) - np.log(scale), axis=(1, 2))


def _data(engine: LastLayerFilter, stack: Tasks, drawn: Array, prior: Array, key: Array) -> dict[str, dict[str, Any]]:
    """Groups by task and example, masked examples nan."""
    posterior_key, prior_key = jax.random.split(key)
    likelihood, rows = engine.head.likelihood, []
    for t in range(len(stack)):
        batch = stack.at(t).data
        phi = jnp.asarray(engine.features(batch))
        y = jnp.asarray(likelihood.checked(engine.head.labels(batch)))
        counted = np.ones(len(phi), bool) if stack.mask is None else np.asarray(stack.mask[t])
        own, other = (jax.random.fold_in(k, t) for k in (posterior_key, prior_key))
        replicated, density = _observe(likelihood, phi, y, drawn[:, min(t, drawn.shape[1] - 1)], own)
        imagined, _ = _observe(likelihood, phi, y, prior[:, min(t, prior.shape[1] - 1)], other)
        rows.append([_or_nan(part, counted) for part in (replicated, density, imagined, y[None])])
    replicated, density, imagined, observed = (np.stack(part, axis=1) for part in zip(*rows, strict=True))
    constants = {name: value for name, value in stack.data.items() if name == engine.head.inputs}
    return {
        "posterior_predictive": {"y": replicated},
        "log_likelihood": {"y": density},
        "prior_predictive": {"y": imagined},
        "observed_data": {"y": observed[0]},
        "constant_data": constants if stack.mask is None else {**constants, "mask": stack.mask},
    }


@jax.jit
def _observe(likelihood: HeadLikelihood, phi: Array, y: Array, weights: Array, key: Array) -> tuple[Array, Array]:
    """Replicated labels (S, n, ...) and log densities (S, n) under draws (S, K, D)."""
    outputs = jnp.einsum("nd,skd->snk", phi, weights)
    density = jax.vmap(lambda f: likelihood.log_prob(f, y))(outputs)
    return likelihood.distribution(outputs, y).sample(key), density


def _or_nan(values: Array, counted: np.ndarray) -> np.ndarray:
    """(S, n, ...) with nan where an example does not count; a last axis of one output is dropped."""
    array = np.asarray(values)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if counted.all():
        return array
    weight = counted.reshape(1, -1, *(1,) * (array.ndim - 2))
    return np.where(weight, array.astype(float), np.nan)
