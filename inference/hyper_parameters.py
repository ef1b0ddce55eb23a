"""A program's hyper-parameters as an engine learns them: their supports, and which weights they move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from ssm_nn.extraction import Layout, Program
from ssm_nn.markov_path import MarkovPath
from ssm_nn.tasks import Task, stack_tasks

__all__ = ["check_known", "coordinates", "supports"]

Array = Any


def supports(program: Program, task: Task, hypers: Mapping[str, Array]) -> dict[str, Any]:
    """The constraint of every latent site outside the weights, by name; the program runs once, on one task."""
    seeded = handlers.seed(handlers.condition(program, data=dict(hypers)), jax.random.key(0))
    with handlers.block():
        trace = handlers.trace(seeded).get_trace(stack_tasks([task]))
    return {
        name: site["fn"].support
        for name, site in trace.items()
        if name in hypers and site["type"] == "sample" and not isinstance(site["fn"], MarkovPath)
    }


def check_known(names: Iterable[str], hypers: Mapping[str, Array], argument: str) -> None:
    """Raise ValueError for a name that is no hyper-parameter of the engine, or a value that is no single number."""
    for name in names:
        if name not in hypers:
            raise ValueError(f"{argument} names {name!r}; the engine has the hyper-parameters {sorted(hypers)}")
        if np.ndim(hypers[name]):
            raise ValueError(
                f"{argument} names {name!r}, of shape {np.shape(hypers[name])}; a single number is accepted"
            )


def coordinates(layout: Layout, pattern: str, argument: str) -> Array:
    """(P,), true for the weights whose leaf fits ``pattern``, by its path (``"layers.0.*"``) or its site's name.

    Raises:
        ValueError: if no leaf fits.
    """
    chosen = [fnmatchcase(site.path, pattern) or fnmatchcase(site.name, pattern) for site in layout.sites]
    if not any(chosen):
        paths = ", ".join(site.path for site in layout.sites)
        raise ValueError(f"{argument}: no weights match the pattern {pattern!r}; the paths are {paths}")
    sizes = [site.stop - site.start for site in layout.sites]
    return jnp.asarray(np.repeat(chosen, sizes))
