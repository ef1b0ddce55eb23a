"""Beliefs of tasks one by one, where no distribution of whole trajectories is at hand.

    q(theta_1 .. theta_T) = prod_t N(theta_t; m_t, Lambda_t^-1)

A filtered belief does not know the tasks that come later, and the beliefs of an engine with known task identity know nothing
of each other: draws of different tasks are independent. Exact as marginals, wherever the engine's beliefs are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.extraction import Layout, Program
from ssm_nn.inference.beliefs import Belief, Filtered
from ssm_nn.inference.smoothing import filter_statistics

__all__ = ["Marginals", "marginals_of"]

Array = Any


@dataclass(frozen=True)
class Marginals:
    """One belief a task; ``predict`` and ``to_datatree`` of ``ssm_nn.inference`` take it.

    Attributes:
        program, hypers: what the beliefs belong to.
        layout: how the weights lie in one vector; sites that are not frozen have draws of their own for every task.
        beliefs: one Belief a task.
        statistics: what the engine said of every task, name -> T numbers.
    """

    program: Program
    hypers: Mapping[str, Array]
    layout: Layout
    beliefs: tuple[Belief, ...]
    statistics: Mapping[str, Sequence[float]]

    def __len__(self) -> int:
        return len(self.beliefs)

    def sample_path(self, key: Array) -> Array:
        """One draw (T, P), each task's from its own belief."""
        keys = jax.random.split(key, len(self))
        return jnp.stack([b.mean + _sample(b.precision, k) for b, k in zip(self.beliefs, keys, strict=True)])

    def log_density(self, path: Array) -> Array | None:
        """Log density of a path (T, P); None for beliefs that vary in fewer directions than there are weights."""
        if not all(hasattr(belief.precision, "logdet") for belief in self.beliefs):
            return None
        return sum((_log_density(b, theta) for b, theta in zip(self.beliefs, path, strict=True)), jnp.zeros(()))


def marginals_of(filtered: Filtered) -> Marginals:
    """The filter's beliefs; a leaf that never moves has the draws of the last one."""
    statistics = filter_statistics(filtered.infos)
    return Marginals(filtered.program, filtered.hypers, filtered.layout, tuple(filtered.beliefs), statistics)


@jax.jit
def _sample(precision: Any, key: Array) -> Array:
    return precision.sample(key)


@jax.jit
def _log_density(belief: Belief, theta: Array) -> Array:
    precision: Any = belief.precision
    residual = theta - belief.mean
    return 0.5 * (precision.logdet() - precision.quadratic(residual) - residual.size * jnp.log(2 * jnp.pi))
