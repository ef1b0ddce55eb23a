"""A posterior as an ArviZ DataTree; the same groups, dimensions and names for every engine.

    posterior             draws of every leaf: chain, draw, task, and the leaf's named axes
    sample_stats          log_q, the log density of each draw under the posterior; lp, its log joint density, where tasks are
                          given and draws are of whole trajectories
    filtered, smoothed    mean and sd of every leaf, by task
    filter_stats          what the filter said of every task: log evidence, gradient norm, ...
    hypers                the hyper-parameters at which the engine ran
  and, where tasks are given,
    posterior_predictive  draws of every observed site, by task and example
    log_likelihood        log p(y_n | theta), by draw, task and example, through the network itself
    prior, prior_predictive, observed_data, constant_data

Draws of a Laplace posterior belong to the linearised network: where the network is far from linear over the belief, its own
likelihoods at them are far too low, and ``diagnosis.leave_one_out(...).tree`` has those that ``az.loo`` should be given.

Masked examples are nan. Draws are made and moved to the host as many at a time as hold some millions of weights and of numbers
in the data, at least one: memory on the device does not grow with the draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import Layout
from ssm_nn.inference.beliefs import Belief, Filtered
from ssm_nn.inference.checks import check_count
from ssm_nn.inference.draws import collect, observed_values, posterior_draw, prior_draw
from ssm_nn.inference.marginals import Marginals, marginals_of
from ssm_nn.inference.smoothing import Smoothed, filter_statistics
from ssm_nn.tasks import Task, Tasks, stack_tasks

if TYPE_CHECKING:
    import xarray

__all__ = ["TreeMaker", "as_dataset", "to_datatree"]

Array = Any

_NUMBERS_TOGETHER = 2**22
SAMPLED = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "prior", "prior_predictive")


def to_datatree(
    posterior: Smoothed | Filtered | Marginals,
    *,
    num_samples: int = 200,
    key: Array | int = 0,
    tasks: Tasks | Iterable[Task | Mapping[str, Any]] | None = None,
    keep: Sequence[str] = ("*",),
) -> xarray.DataTree:
    """The posterior with its draws, diagnostics and, where ``tasks`` are given, predictions and likelihoods.

    Args:
        posterior: what ``smooth`` returned; or the filter's beliefs, ``run``'s, or Marginals, whose tasks are drawn
            independently, so that there is no ``lp``.
        num_samples: draws of all tasks together; chain is 1.
        key: of the draws; a whole number is taken as a seed.
        tasks: the tasks in order, for the groups that need data.
        keep: patterns of the sites whose draws are stored, such as ``["net.output.*"]``; draws of all weights of a large
            network need T P num_samples numbers on the host (``write_datatree`` holds a chunk of them at a time). Means,
            deviations and predictions are of all weights anyway.

    Returns:
        An ``xarray.DataTree``; store it with ``to_netcdf`` or ``to_zarr``.

    Raises:
        ValueError: for another kind of posterior, another number of tasks, patterns that fit no site.
    """
    import xarray

    maker = TreeMaker(posterior, num_samples, key, tasks, keep)
    return xarray.DataTree.from_dict({**maker.sampled(0, num_samples), **maker.fixed()})


class TreeMaker:
    """The groups of a tree, the draws among them in any portions; arguments as for ``to_datatree``."""

    def __init__(
        self, posterior: Any, num_samples: int, key: Array | int, tasks: Any, keep: Sequence[str] = ("*",)
    ) -> None:
        check_count(num_samples=num_samples)
        if not isinstance(posterior, Smoothed | Filtered | Marginals):
            raise ValueError(
                f"posterior is {type(posterior).__name__}; what smooth, run or posterior_of returned is accepted"
            )
        self.posterior = marginals_of(posterior) if isinstance(posterior, Filtered) else posterior
        self.stack = None if tasks is None else stack_tasks(tasks)
        if self.stack is not None and len(self.stack) != len(posterior):
            raise ValueError(f"tasks holds {len(self.stack)} tasks, but the posterior has {len(posterior)}")
        sites = self.posterior.layout.sites
        kept = frozenset(site.name for site in sites if any(fnmatchcase(site.name, pattern) for pattern in keep))
        if not kept:
            raise ValueError(f"keep is {list(keep)}, which fits none of {', '.join(site.name for site in sites)}")
        posterior_key, prior_key = jax.random.split(jax.random.key(key) if isinstance(key, int) else key)
        self._draws = [(posterior_draw(self.posterior, self.stack, kept), posterior_key)]
        if self.stack is not None:
            self._draws.append((prior_draw(self.posterior, self.stack, kept), prior_key))
        self._num_samples = num_samples
        of_one = len(posterior) * self.posterior.layout.size
        of_one += 0 if self.stack is None else sum(np.size(leaf) for leaf in jax.tree.leaves(self.stack.data))
        self._together = min(max(_NUMBERS_TOGETHER // max(of_one, 1), 1), num_samples)
        self._leaf_dims = {
            site.name: ([] if site.frozen else ["task"]) + _axes(site.name, len(site.shape)) for site in sites
        }

    def sampled(self, start: int, stop: int) -> dict[str, xarray.Dataset]:
        """Place -> data set of the draws from ``start`` to ``stop``; the same whatever the portions."""
        values: dict[str, Any] = {}
        for draw, key in self._draws:
            values |= collect(draw, jax.random.split(key, self._num_samples)[start:stop], self._together)
        made = {f"/{group}": self._dataset(group, named, {}) for group, named in values.items()}
        return {place: dataset.assign_coords(draw=np.arange(start, stop)) for place, dataset in made.items()}

    def fixed(self) -> dict[str, xarray.Dataset]:
        """Place -> data set of all that is not drawn."""
        posterior = self.posterior
        values: dict[str, Any] = {}
        filtered = posterior.filtered.beliefs if isinstance(posterior, Smoothed) else posterior.beliefs
        values["filtered"], dims = _summaries(filtered, posterior.layout)
        if isinstance(posterior, Smoothed):
            values["smoothed"], _ = _summaries(posterior.beliefs, posterior.layout)
            values["filter_stats"] = filter_statistics(posterior.filtered.infos)
        elif posterior.statistics:
            values["filter_stats"] = posterior.statistics
        if posterior.hypers:
            values["hypers"] = posterior.hypers
        if self.stack is not None:
            theta = posterior.beliefs[0].mean
            values["observed_data"] = observed_values(posterior.program, posterior.hypers, self.stack, theta)
            values["constant_data"] = _constants(self.stack, values["observed_data"])
        return {f"/{group}": self._dataset(group, named, dims) for group, named in values.items()}

    def _dataset(self, group: str, named: Mapping[str, Any], summary_dims: Mapping[str, list[str]]) -> xarray.Dataset:
        arrays = {name: np.asarray(value) for name, value in named.items()}
        if group in ("posterior", "prior"):
            dims = {name: self._leaf_dims[name] for name in arrays}
        else:
            dims = {n: summary_dims.get(n) or _data_dims(group, n, array.ndim) for n, array in arrays.items()}
        return as_dataset(arrays, dims, len(self.posterior), sampled=group in SAMPLED)


def as_dataset(
    arrays: Mapping[str, np.ndarray], dims: Mapping[str, list[str]], num_tasks: int, *, sampled: bool
) -> xarray.Dataset:
    """Arrays with named dimensions; those that are sampled have the draws first, and get the dimension chain."""
    from arviz_base import dict_to_dataset

    return dict_to_dataset(
        {name: array[None] if sampled else array for name, array in arrays.items()},
        coords={"task": np.arange(num_tasks)},
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
    left = rank - (group in SAMPLED)
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
