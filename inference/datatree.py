"""A posterior as an ArviZ DataTree.

    posterior             draws of every leaf: chain, draw, task, and the leaf's named axes
    sample_stats          log_q, the log density of each draw under the smoother; with tasks lp, its log joint density
    filtered, smoothed    mean and sd of every leaf, by task
    filter_stats          what the filter said of every task: log evidence, gradient norm, ...
    hypers                the hyper-parameters at which the engine ran
  and, where tasks are given,
    posterior_predictive  draws of every observed site, by task and example
    log_likelihood        log p(y_n | theta), by draw, task and example
    prior, prior_predictive, observed_data, constant_data

Masked examples are nan. One draw is made and moved to the host at a time: memory on the device does not grow with the draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import Layout
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.checks import check_count
from ssm_nn.inference.draws import collect, observed_values, posterior_draw, prior_draw
from ssm_nn.inference.smoothing import Smoothed, filter_statistics
from ssm_nn.tasks import Task, Tasks, stack_tasks

if TYPE_CHECKING:
    import xarray

__all__ = ["to_datatree"]

Array = Any

_SAMPLED = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "prior", "prior_predictive")


def to_datatree(
    smoothed: Smoothed,
    *,
    num_samples: int = 200,
    key: Array | int = 0,
    tasks: Tasks | Iterable[Task | Mapping[str, Any]] | None = None,
    keep: Sequence[str] = ("*",),
) -> xarray.DataTree:
    """The smoothed posterior with its draws, diagnostics and, where ``tasks`` are given, predictions and likelihoods.

    Args:
        smoothed: what ``LaplaceFilter.smooth`` returned.
        num_samples: draws of whole trajectories; chain is 1.
        key: of the draws; a whole number is taken as a seed.
        tasks: the tasks in order, for the groups that need data.
        keep: patterns of the sites whose draws are stored, such as ``["net.output.*"]``; draws of all weights of a large
            network need T P num_samples numbers on the host. Means, deviations and predictions are of all weights anyway.

    Returns:
        An ``xarray.DataTree``; store it with ``to_netcdf`` or ``to_zarr``.
    """
    import xarray

    check_count(num_samples=num_samples)
    stack = None if tasks is None else stack_tasks(tasks)
    if stack is not None and len(stack) != len(smoothed):
        raise ValueError(f"tasks holds {len(stack)} tasks, but the posterior has {len(smoothed)}")
    key = jax.random.key(key) if isinstance(key, int) else key
    posterior_key, prior_key = jax.random.split(key)
    layout = smoothed.layout
    kept = frozenset(site.name for site in layout.sites if any(fnmatchcase(site.name, pattern) for pattern in keep))
    if not kept:
        raise ValueError(f"keep is {list(keep)}, which fits none of {', '.join(site.name for site in layout.sites)}")

    values: dict[str, dict[str, Any]] = collect(
        posterior_draw(smoothed, stack, kept), jax.random.split(posterior_key, num_samples)
    )
    if stack is not None:
        values |= collect(prior_draw(smoothed, stack, kept), jax.random.split(prior_key, num_samples))
    values["filtered"], summary_dims = _summaries(smoothed.filtered.beliefs, layout)
    values["smoothed"], _ = _summaries(smoothed.beliefs, layout)
    values["filter_stats"] = filter_statistics(smoothed.filtered.infos)
    if smoothed.hypers:
        values["hypers"] = smoothed.hypers
    if stack is not None:
        values["observed_data"] = observed_values(smoothed.program, smoothed.hypers, stack, smoothed.means[0])
        values["constant_data"] = _constants(stack, values["observed_data"])

    leaf_dims = {site.name: [] if site.frozen else ["task"] for site in layout.sites}
    leaf_dims = {site.name: leaf_dims[site.name] + _axes(site.name, len(site.shape)) for site in layout.sites}
    groups = {}
    for group, named in values.items():
        arrays = {name: np.asarray(value) for name, value in named.items()}
        dims = {
            name: leaf_dims.get(name) or summary_dims.get(name) or _data_dims(group, name, array.ndim)
            for name, array in arrays.items()
        }
        if group in ("posterior", "prior"):
            dims = {name: leaf_dims[name] for name in arrays}
        groups[f"/{group}"] = _dataset(arrays, dims, np.arange(len(smoothed)), sampled=group in _SAMPLED)
    return xarray.DataTree.from_dict(groups)


def _dataset(
    arrays: Mapping[str, np.ndarray], dims: Mapping[str, list[str]], tasks: np.ndarray, *, sampled: bool
) -> Any:
    from arviz_base import dict_to_dataset

    return dict_to_dataset(
        {name: array[None] if sampled else array for name, array in arrays.items()},
        coords={"task": tasks},
        dims={name: tuple(axes) for name, axes in dims.items()},
        sample_dims=["chain", "draw"] if sampled else [],
    )


def _axes(name: str, count: int) -> list[str]:
    return [f"{name}_axis_{axis}" for axis in range(count)]


def _data_dims(group: str, name: str, rank: int) -> list[str]:
    """Dimensions of an array by task and example; draws come before them in the sampled groups."""
    if group == "hypers":
        return _axes(name, rank)
    if group == "constant_data" and name.startswith("context."):
        return ["task", *_axes(name, rank - 1)]
    left = rank - (group in _SAMPLED)
    return ["task", "example"][:left] + _axes(name, left - 2)


def _constants(stack: Tasks, observed: Mapping[str, Any]) -> dict[str, Any]:
    constants = {name: value for name, value in stack.data.items() if name not in observed}
    constants |= {f"context.{name}": value for name, value in stack.context.items()}
    return constants if stack.mask is None else {**constants, "mask": stack.mask}


def _summaries(beliefs: Iterable[Belief], layout: Layout) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Mean and sd of every leaf over tasks, and their dimensions."""
    moments = [[np.asarray(moment) for moment in _moments(belief)] for belief in beliefs]
    values, dims = {}, {}
    for suffix, rows in zip(("mean", "sd"), zip(*moments, strict=True), strict=True):
        for site_name, leaf in layout.leaves(np.stack(rows)).items():
            values[f"{site_name}.{suffix}"] = leaf
            dims[f"{site_name}.{suffix}"] = ["task", *_axes(site_name, leaf.ndim - 1)]
    return values, dims


@jax.jit
def _moments(belief: Belief) -> tuple[Array, Array]:
    return belief.mean, jnp.sqrt(belief.precision.variance())
