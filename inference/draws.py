"""Draws of whole trajectories and of what is observed under them, moved to the host a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import Layout, Program, extract, path_distributions
from ssm_nn.inference.marginals import Marginals
from ssm_nn.inference.smoothing import Smoothed
from ssm_nn.tasks import Task, Tasks

__all__ = ["collect", "leaves_of_path", "posterior_draw", "prior_draw"]

Array = Any
Draw = dict[str, dict[str, Any]]


def leaves_of_path(layout: Layout, path: Array) -> dict[str, Array]:
    """Site name -> (T, *leaf), or (1, *leaf) for leaves that never move, of one path (T, P)."""
    leaves = layout.leaves(path)
    return {site.name: leaves[site.name][-1:] if site.frozen else leaves[site.name] for site in layout.sites}


def collect(draw: Callable[[Array], Draw], keys: Array, together: int) -> dict[str, dict[str, np.ndarray]]:
    """``draw`` at every key, ``together`` at a time, stacked on the host: group -> name -> (draws, ...)."""
    groups: dict[str, dict[str, list[np.ndarray]]] = {}
    for start in range(0, len(keys), together):
        count = min(together, len(keys) - start)
        # the last ones filled up: another number would be compiled for, and might round otherwise
        some = keys[jnp.minimum(jnp.arange(start, start + together), len(keys) - 1)]
        for group, values in jax.vmap(draw)(some).items():
            for name, value in values.items():
                groups.setdefault(group, {}).setdefault(name, []).append(np.asarray(value)[:count])
    return {group: {name: np.concatenate(values) for name, values in named.items()} for group, named in groups.items()}


def posterior_draw(
    posterior: Smoothed | Marginals, stack: Tasks | None, kept: frozenset[str]
) -> Callable[[Array], Draw]:
    """One draw of all tasks by key, its sites in ``kept``, and with tasks its replicated data and densities."""

    def draw(key: Array) -> Draw:
        path_key, data_key = jax.random.split(key)
        path = posterior.sample_path(path_key)
        made: Draw = {"posterior": _without_still_axis(posterior.layout, path, kept)}
        log_q = posterior.log_density(path)
        if log_q is not None:
            made["sample_stats"] = {"log_q": log_q}
        if stack is not None:
            program, hypers = posterior.program, posterior.hypers
            replicated, density, total = _of_data(program, hypers, stack, path, data_key)
            made["posterior_predictive"], made["log_likelihood"] = replicated, density
            if isinstance(posterior, Smoothed):
                made["sample_stats"]["lp"] = total + _path_log_prob(program, posterior.layout, hypers, stack, path)
        return made

    return draw


def prior_draw(smoothed: Smoothed | Marginals, stack: Tasks, kept: frozenset[str]) -> Callable[[Array], Draw]:
    """One trajectory of the program's prior by key, its sites in ``kept``, and its replicated data."""

    def draw(key: Array) -> Draw:
        path_key, data_key = jax.random.split(key)
        path = _prior_path(smoothed.program, smoothed.layout, smoothed.hypers, stack, path_key)
        replicated, _, _ = _of_data(smoothed.program, smoothed.hypers, stack, path, data_key)
        return {"prior": _without_still_axis(smoothed.layout, path, kept), "prior_predictive": replicated}

    return draw


def observed_values(program: Program, hypers: Mapping[str, Array], stack: Tasks, theta: Array) -> dict[str, np.ndarray]:
    """The observed value of every site, (T, N, ...); nan where an example is masked."""

    def of_task(inputs):
        data, context, mask = inputs
        task = Task.tree_unflatten(None, (data, context, mask))
        sites = extract(program, task, hypers).observe(theta, task)
        return {n: _or_nan(site.value, site.weight) for n, site in sites.items() if site.value is not None}

    return jax.tree.map(np.asarray, jax.lax.map(of_task, (stack.data, stack.context, stack.mask)))


def _without_still_axis(layout: Layout, path: Array, kept: frozenset[str]) -> dict[str, Array]:
    leaves = leaves_of_path(layout, path)
    still = {site.name: site.frozen for site in layout.sites if site.name in kept}
    return {name: leaves[name][0] if frozen else leaves[name] for name, frozen in still.items()}


@partial(jax.jit, static_argnums=0)
def _of_data(
    program: Program, hypers: Any, stack: Tasks, path: Array, key: Array
) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """Replicated data and log densities of one path, (T, N, ...) by site, nan where masked; and their counted sum."""

    def of_task(total, inputs):
        theta, data, context, mask, task_key = inputs
        task = Task.tree_unflatten(None, (data, context, mask))
        sites = extract(program, task, hypers).observe(theta, task)
        drawn, density = {}, {}
        for site_key, (name, site) in zip(jax.random.split(task_key, len(sites)), sites.items(), strict=True):
            drawn[name] = _or_nan(site.distribution.sample(site_key), site.weight)
            if site.value is not None:
                density[name] = _or_nan(site.distribution.log_prob(site.value), site.weight)
                total = total + jnp.sum(site.log_likelihood())
        return total, (drawn, density)

    keys = jax.random.split(key, path.shape[0])
    zero = jnp.zeros((), path.dtype)
    total, made = jax.lax.scan(of_task, zero, (path, stack.data, stack.context, stack.mask, keys))
    return *made, total


@partial(jax.jit, static_argnums=(0, 1))
def _prior_path(program: Program, layout: Layout, hypers: Any, stack: Tasks, key: Array) -> Array:
    distributions = path_distributions(program, stack, hypers)
    columns = []
    for site_key, site in zip(jax.random.split(key, len(layout.sites)), layout.sites, strict=True):
        drawn = distributions[site.name].sample(site_key)
        columns.append(jnp.broadcast_to(drawn, (len(stack), *site.shape)).reshape(len(stack), -1))
    return jnp.concatenate(columns, axis=1)


@partial(jax.jit, static_argnums=(0, 1))
def _path_log_prob(program: Program, layout: Layout, hypers: Any, stack: Tasks, path: Array) -> Array:
    leaves = leaves_of_path(layout, path)
    distributions = path_distributions(program, stack, hypers)
    return sum(distributions[name].log_prob(leaf) for name, leaf in leaves.items())


def _or_nan(values: Array, weight: Array) -> Array:
    if weight.ndim == 0:
        return values
    weight = weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim))
    return jnp.where(weight > 0, values, jnp.nan)
