"""The maximum a posteriori problem of one task, in the form that does not cancel.

With theta = m' + d, m' and Lambda' the prediction, minimise over d

    - power * log p(D | m' + d) + 1/2 d^T Lambda' d

where the second term is a sum of squares of d, never an expanded square of theta.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ssm_nn.extraction import StateSpace
from ssm_nn.tasks import Task

__all__ = ["CONVERGED", "FIXED_BUDGET", "NOT_CONVERGED", "NOT_FINITE", "MapEstimator", "MapProblem", "MapResult"]

Array = Any

CONVERGED, FIXED_BUDGET, NOT_CONVERGED, NOT_FINITE = range(4)


Objective = Callable[..., Array]


class MapProblem(NamedTuple):
    """Everything the objective reads, as arrays: a pytree that is passed through ``jit``.

    Attributes:
        mean: m' (P,).
        precision: Lambda'.
        task: the examples, with a mask.
        hypers: the program's hyper-parameters.
        power: how often the likelihood counts.
    """

    mean: Array
    precision: Any
    task: Task
    hypers: Any
    power: Array

    def objective(self, space: StateSpace) -> Objective:
        """The objective as a function of the shift d, of a batch, and of what one of the batch's examples counts."""
        square = self.precision.quadratic_form()

        def value(shift: Array, batch: Task | None = None, scale: Array | float = 1.0) -> Array:
            log_likelihood = space.log_likelihood(self.mean + shift, self.task if batch is None else batch)
            return 0.5 * square(shift) - self.power * scale * log_likelihood

        return value


class MapResult(NamedTuple):
    """``shift`` (P,) from the prediction, steps taken, status (one of the four codes), and the objective at the end."""

    shift: Array
    steps: int
    status: int
    objective: float


class MapEstimator(Protocol):
    """Minimises the objective of a ``MapProblem``; compiled once by ``bind``."""

    def bind(self, program: Any) -> Any:
        """A function (problem, start (P,), key) -> MapResult for this program, its compiled parts cached."""
        ...


def norm(x: Array) -> Array:
    """Euclidean norm."""
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def all_finite(tree: Any) -> Array:
    """Whether every number of a pytree is finite."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.asarray(True)
