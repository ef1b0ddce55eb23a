"""Which columns of a task's information may differ from zero: those of a scale that no weight enters never do."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.interpreters import partial_eval

from ssm_nn.extraction import StateSpace
from ssm_nn.inference.batches import single
from ssm_nn.likelihoods import likelihood_of
from ssm_nn.tasks import Task

__all__ = ["informative_columns"]

Array = Any


def informative_columns(space: StateSpace, task: Task) -> tuple[int, ...]:
    """Of the columns (C,) of one example, those that the weights may fill; by abstract evaluation.

    A ``Normal`` has a column for its location and one for its scale; the noise of most programs is the same at all weights.
    """
    example = single(task, jax.tree.map(lambda a: a[0], task.data), task.mask[0])
    known = _known_scales(space, example)
    kept, start = [], 0
    for name, count in _widths(space, example).items():
        kept += range(start, start + count, 2 if name in known else 1)
        start += count
    return tuple(kept)


def _known_scales(space: StateSpace, example: Task) -> set[str]:
    """Names of the sites that are Normal with a scale which is no function of the weights."""
    names: list[str] = []

    def scales(theta: Array) -> list[Array]:
        sites = space.observed(theta, example)
        names[:] = [name for name, site in sites.items() if type(site.distribution) is dist.Normal]
        normal = [cast("dist.Normal", sites[name].distribution) for name in names]
        return [jnp.asarray(distribution.scale) for distribution in normal]

    traced = jax.make_jaxpr(scales)(space.initial).jaxpr

    def reached(which: int) -> bool:
        return partial_eval.dce_jaxpr(traced, [i == which for i in range(len(names))])[1][0]

    return {name for i, name in enumerate(names) if not reached(i)}


def _widths(space: StateSpace, example: Task) -> dict[str, int]:
    """Number of columns by site, in the order in which they stand."""

    def factors(theta: Array) -> dict[str, Array]:
        return {
            name: likelihood_of(site.distribution).factor(site.value)
            for name, site in space.observed(theta, example).items()
        }

    by_site = jax.eval_shape(factors, space.initial)
    return {name: found.size // found.shape[-2] for name, found in by_site.items()}
